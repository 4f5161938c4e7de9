"""Every family is exact over real ranks: with padding, a cache, micro-batches, any blocks, and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from support.families import TEXT_FAMILIES, VISION_FAMILIES, why_not_run
from support.family_ranks import Case, compared_over_ranks, trained_over_ranks
from support.gloo import Gloo

FAMILIES = [family for family in sorted({*TEXT_FAMILIES, *VISION_FAMILIES}) if not why_not_run(family)]
JOBS = 12  # each imports the modules of its families once, on every rank

CASES = {  # the first and the last block of those of all kinds have no attention
    "one rank": Case([[0, 1, 2, 3]], "of all kinds"),
    "two ranks": Case([[0, 1, 2], [3]], "of all kinds", rows=(1, 1, 1)),
    "three ranks, of which one owns nothing": Case([[0, 1], [], [2, 3]], "tied", rows=(1, 1, 1)),
    "four ranks": Case([[0], [1], [2], [3]]),
    "four ranks, of all kinds": Case([[0], [1], [2], [3]], "of all kinds"),
}


in_jobs = pytest.mark.parametrize("families", [FAMILIES[at::JOBS] for at in range(JOBS)], ids=" ".join)


@pytest.mark.slow
@in_jobs
def test_logits_and_tokens_are_those_of_one_process(gloo: Gloo, families: Sequence[str]) -> None:
    for found in gloo.run_ok(compared_over_ranks, families, CASES, world_size=4, timeout=240):
        assert found == {}


@pytest.mark.slow
@in_jobs
def test_gradients_are_those_of_one_process(gloo: Gloo, families: Sequence[str]) -> None:
    for found in gloo.run_ok(trained_over_ranks, families, world_size=2, timeout=240):
        refused = found.pop("paligemma", None)
        assert found == {}
        assert refused is None or "paligemma attends otherwise where its forward is given labels" in refused
