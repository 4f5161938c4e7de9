"""Every family is exact over real ranks: with padding, a cache, micro-batches, and blocks of any kind."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from support.families import TEXT_FAMILIES, VISION_FAMILIES
from support.family_ranks import compared_over_ranks, kinds_with_no_op_at
from support.gloo import Gloo

FAMILIES = sorted({*TEXT_FAMILIES, *VISION_FAMILIES})
SHARE = 12  # families of one job: each of its ranks imports torch's half once, and every family's module


def shares() -> list[list[str]]:
    return [FAMILIES[at::SHARE] for at in range(SHARE)]


@pytest.mark.slow
@pytest.mark.parametrize("families", shares(), ids=" ".join)
def test_homogeneous(gloo: Gloo, families: Sequence[str]) -> None:
    owned = [[0], [1, 2], [3]]
    for found in gloo.run_ok(compared_over_ranks, families, owned, None, False, world_size=3, timeout=300):
        assert found == {}


@pytest.mark.slow
@pytest.mark.parametrize("families", shares(), ids=" ".join)
def test_heterogeneous(gloo: Gloo, families: Sequence[str]) -> None:
    owned = [[0, 1], [], [2, 3]]
    kinds = {family: kinds_with_no_op_at(family, 2) for family in families}
    for found in gloo.run_ok(compared_over_ranks, families, owned, kinds, False, world_size=3, timeout=300):
        assert found == {}
