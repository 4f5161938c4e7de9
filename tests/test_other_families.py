"""Families outside the llama shape load through transformers' own converters, shard by shard, bit-equal.

They are not claimed yet, only not broken: the rules that describe them are the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.compare import assert_same_tensors, storage_of_stubs
from support.tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM

from patchers.errors import ConfigError, FamilyError
from sharded_ckpt import load_and_shard_model

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILIES = {
    "gpt2": {"n_inner": 96},  # other names, learned positions outside the blocks
    "gemma2": {},  # four norms a layer
    "phi": {},  # attention and FFN in parallel
    "gpt_neox": {},  # fused projections
    "mixtral": {"num_local_experts": 4},  # experts of the checkpoint are fused in the model
    "qwen3_moe": MOE,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_equal_from_pretrained(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(tmp_path, family, shards=1, **FAMILIES[family])
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for owned in ({0, 1, 2, 3}, {0}, {1, 2}, {3}):
        model = load_and_shard_model("auto", folder, owned, dtype=torch.bfloat16)
        assert_same_tensors(model, reference, partial=len(owned) < 4)
        assert storage_of_stubs(model) == 0
        assert model.load_report.route == "converted"


def test_direct_assignment_is_refused_where_it_is_not_known_to_be_exact(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "gemma2")
    with pytest.raises(ConfigError, match="gemma2 checkpoints are not known to need no conversion"):
        load_and_shard_model("auto", folder, route="direct")


def test_removal_that_a_family_cannot_bear_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "minimax", num_local_experts=4, block_size=8)
    blocks = [{"attention": {"no_op": True}}] + [{}] * 3
    with pytest.raises(
        FamilyError, match=r"in minimax a layer without it is not the identity|no single attention"
    ):
        load_and_shard_model("auto", folder, block_configs=blocks)
