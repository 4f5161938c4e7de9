"""docs/command_line.md shows every command."""

from __future__ import annotations

import re
from pathlib import Path

from sharded_ckpt.cli import COMMANDS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "command_line.md"
NOT_SHOWN = {"demo"}  # docs/first_hour.md shows it


def test_every_command_has_a_section() -> None:
    sections = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(sections) == sorted(command.name for command in COMMANDS)


def test_what_every_command_prints_is_shown() -> None:
    shown = re.findall(r"^\$ sharded-ckpt (\S+)", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(shown) == {command.name for command in COMMANDS} - NOT_SHOWN
