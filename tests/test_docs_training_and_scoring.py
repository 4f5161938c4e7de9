"""The examples in docs/training_and_scoring.md run as they are printed."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
from support.tiny import tiny_checkpoint

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training_and_scoring.md"


def test_every_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path, layers=4).rename(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    examples = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL))
    test = doctest.DocTestParser().get_doctest(examples, {}, PAGE.name, str(PAGE), 0)
    assert len(test.examples) > 25
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0
