"""docs/ownership.md: its figures are those of the planner, as the script prints them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "ownership.md"
CONFIGS = ROOT.parent / "shared" / "configs"
PUBLISHED = ["llama-3_1-nemotron-ultra-253b-v1", "llama-3_3-nemotron-super-49b-v1"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_figures_of_the_published_models_are_what_the_script_prints(name: str) -> None:
    file = CONFIGS / f"{name}.config.json"
    if not file.exists():
        pytest.skip("the published configs are not beside this checkout")
    script = [sys.executable, str(ROOT / "docs" / "planner_table.py"), str(file)]
    said = subprocess.run(script, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    rows = said.stdout.splitlines()[2:]
    assert len(rows) == 4, said.stderr
    page = PAGE.read_text(encoding="utf-8")
    assert [row for row in rows if row not in page] == []
