"""The list of small files in docs/saving.md is the code's."""

from __future__ import annotations

import re
from pathlib import Path

from sharded_ckpt.saving.carried_files import CARRIED, CODE, TEMPLATES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "saving.md"


def test_the_page_names_every_kind_of_file_that_is_carried_over():
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)))
    kinds = {re.sub(r"^chat_template.*", "chat_template*", name) for name in (*CARRIED, CODE)}
    kinds = kinds - {"*processor_config.json"} | {f"{TEMPLATES}/*.jinja"}
    assert kinds - named == set()
