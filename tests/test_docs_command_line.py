"""Every command in docs/command_line.md prints what the page shows."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
from support.hollow import LLAMA, hollow_checkpoint, llama_shapes, pruned_checkpoint

from sharded_ckpt.cli import COMMANDS, main

PAGE = Path(__file__).resolve().parents[1] / "docs" / "command_line.md"
NOT_SHOWN = {"demo", "generate"}
"""They need weights that make sense, and several ranks; their own tests run them."""


def test_every_command_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned_checkpoint(tmp_path / "model")
    hollow_checkpoint(tmp_path / "parent", llama_shapes(), LLAMA)
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    shown = [part for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    used = set()
    for part in shown:
        command, _, expected = part.partition("\n")
        program, *argv = shlex.split(command)
        assert program == "sharded-ckpt"
        main(argv)
        said = capsys.readouterr()
        matches = doctest.OutputChecker().check_output(expected, said.out + said.err, doctest.ELLIPSIS)
        assert matches, f"$ {command}\n{said.out}{said.err}"
        used.add(argv[0])
    assert used == {command.name for command in COMMANDS} - NOT_SHOWN


def test_every_command_has_a_section() -> None:
    sections = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(sections) == sorted(command.name for command in COMMANDS)
