"""The examples in docs/dialects.md, and in the docstrings of what it describes, run as they are printed."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "dialects.md"
MODULES = [
    "base_sizes",
    "block_config",
    "dialects.config_fields",
    "dialects.detection",
    "dialects.nemotron",
    "inference",
    "tensor_roles",
]


def test_every_example_of_the_page_runs():
    page = PAGE.read_text(encoding="utf-8")
    examples = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL))
    test = doctest.DocTestParser().get_doctest(examples, {}, PAGE.name, str(PAGE), 0)
    assert len(test.examples) > 20
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert failed.failed == 0


def test_the_page_names_every_dialect_and_every_field_that_is_not_built():
    from patchers.block_fields import UNBUILT_ATTENTION, UNBUILT_BLOCK, UNBUILT_FFN
    from patchers.dialects import Dialect

    page = PAGE.read_text(encoding="utf-8")
    names = [dialect.value for dialect in Dialect]
    names += [*UNBUILT_ATTENTION, *UNBUILT_FFN, *UNBUILT_BLOCK]
    assert [name for name in names if f"`{name}`" not in page] == []


@pytest.mark.parametrize("module", MODULES)
def test_every_docstring_example_runs(module):
    results = doctest.testmod(importlib.import_module(f"patchers.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
