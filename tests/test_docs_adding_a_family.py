"""The examples in docs/adding_a_family.md run as they are printed."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from patchers import descriptor

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding_a_family.md"


def test_every_example_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptor, "_OWN", {})
    page = PAGE.read_text(encoding="utf-8")
    examples = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL))
    test = doctest.DocTestParser().get_doctest(examples, {"__name__": __name__}, PAGE.name, str(PAGE), 0)
    assert len(test.examples) > 20
    assert doctest.DocTestRunner().run(test).failed == 0
