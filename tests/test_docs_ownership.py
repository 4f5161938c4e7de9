"""docs/ownership.md: its examples run as they are printed, its figures are those of the planner."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest
from support.tiny import heterogeneous_checkpoint

from sharded_ckpt import plan_ownership

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "ownership.md"
CONFIGS = ROOT.parent / "shared" / "configs"
PUBLISHED = {
    "Llama-3.1-Nemotron-Ultra-253B": "llama-3_1-nemotron-ultra-253b-v1",
    "Llama-3.3-Nemotron-Super-49B": "llama-3_3-nemotron-super-49b-v1",
}


def test_every_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heterogeneous_checkpoint(tmp_path).rename(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    examples = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL))
    test = doctest.DocTestParser().get_doctest(examples, {}, PAGE.name, str(PAGE), 0)
    assert len(test.examples) > 8
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE  # columns are as wide as the times measured
    assert doctest.DocTestRunner(optionflags=options).run(test).failed == 0


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_the_figures_of_the_published_models_are_those_of_the_planner(name: str, ranks: int) -> None:
    file = CONFIGS / f"{PUBLISHED[name]}.config.json"
    if not file.exists():
        pytest.skip("the published configs are not beside this checkout")
    config = json.loads(file.read_text())
    even, best = (plan_ownership(config, ranks, split=split) for split in ("even", "min-max"))  # type: ignore[arg-type]
    shown = [f"{max(plan.totals) / 1e9:.1f} GB, {plan.imbalance:.2f}x" for plan in (even, best)]
    ratio = f"{max(even.totals) / max(best.totals):.2f}"
    assert f"| {name} | {ranks} | {shown[0]} | {shown[1]} | {ratio} |" in PAGE.read_text(encoding="utf-8")
