"""Every family that transformers' own loader reads, ours reads too: shard by shard, bit by bit, no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.compare import assert_same_tensors, storage_of_stubs, tensors_in
from support.counted import counted_url, keys_read
from support.families import TEXT_FAMILIES, VISION_FAMILIES
from support.family_checkpoints import family_checkpoint

from patchers.names import fold
from sharded_ckpt import load_and_shard_model

FAMILIES = [family for family in (*TEXT_FAMILIES, *VISION_FAMILIES) if family != "dbrx"]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_equal_from_pretrained_and_nothing_else_is_read(families: Path, family: str) -> None:
    made = family_checkpoint(families, family)
    *halves, middle = made.ownerships
    names: set[str] = set()
    for owned in halves:
        model = load_and_shard_model("auto", counted_url(made.folder), owned, dtype=torch.bfloat16)
        assert_same_tensors(model, made.reference, partial=True)
        assert storage_of_stubs(model) == 0
        wanted = made.keys_for(set(model.state_dict()))
        read = keys_read(made.folder)
        assert read == wanted, f"not needed: {fold(read - wanted)}; not read: {fold(wanted - read)}"
        names |= set(tensors_in(model))
    assert names == set(tensors_in(made.reference))
    model = load_and_shard_model("auto", made.folder, middle, dtype=torch.bfloat16)
    assert_same_tensors(model, made.reference, partial=True)
    assert model.load_report.blocks == tuple(sorted(middle))
