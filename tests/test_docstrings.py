"""Every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
from support.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[1]
FILES = [path for package in ("patchers", "sharded_ckpt") for path in sorted((ROOT / package).rglob("*.py"))]


def has_examples(path: Path) -> bool:
    return any(">>> " in line and "+SKIP" not in line for line in path.read_text().splitlines())


MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if has_examples(path)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("docstrings")))


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = importlib.import_module(module.removesuffix(".__init__"))
    results = doctest.testmod(found, extraglobs={"checkpoint": checkpoint}, optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0
    assert results.failed == 0
