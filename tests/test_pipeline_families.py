"""Stages are exact in every family: without a cache, and decoding with one under left padding."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection
from typing import Any

import pytest
import torch
from support.causal_lms import ENTRIES, small_config
from support.families import TEXT_FAMILIES, drawn_model, family_model
from support.stages import run_stages
from transformers import DynamicCache, PreTrainedModel

from patchers.cache_names import cache_name
from patchers.descriptor import ModelDescriptor
from patchers.errors import OwnershipError, PartialModelError
from patchers.substitutes import UnownedEmbedding
from sharded_ckpt.model import create_local_shard_
from sharded_ckpt.pipeline.lineup import Lineup, require_own_keys

IDS = torch.randint(4, 128, (2, 10), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
PROMPT = 6
EMBEDDING_EVERYWHERE = {"gemma3n_text", "gemma4_text", "llama4_text", "zamba2"}
QUICK = {*EMBEDDING_EVERYWHERE, "gpt2", "bloom", "falcon", "nanochat", "nemotron_h", "mamba2", "qwen3_next"}
OWN_CACHE = {"minimax"}  # takes no cache but its own


def families(without: Collection[str] = ()) -> list[Any]:
    slow = pytest.mark.slow
    return [
        family if family in QUICK else pytest.param(family, marks=slow)
        for family in sorted(set(TEXT_FAMILIES).difference(without))
    ]


def shards_of(model: PreTrainedModel) -> list[PreTrainedModel]:
    """First block, those in the middle, last block: every kind of stage."""
    count = model.config.num_hidden_layers
    return cut_into(model, [[0], list(range(1, count - 1)), [count - 1]])


def cut_into(model: PreTrainedModel, runs: list[list[int]]) -> list[PreTrainedModel]:
    descriptor = ModelDescriptor.of("auto", model.config)
    return [create_local_shard_(copy.deepcopy(model), run, descriptor) for run in runs]


@pytest.mark.parametrize("family", families())
def test_logits_are_bit_equal_without_a_cache(family: str) -> None:
    model = family_model(family)
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    shards = shards_of(model)
    assert torch.equal(run_stages(shards, input_ids=IDS, use_cache=False), logits)
    stubs = [isinstance(shard.get_input_embeddings(), UnownedEmbedding) for shard in shards]
    assert stubs == [False] * 3 if family in EMBEDDING_EVERYWHERE else [False, True, True]


@pytest.mark.parametrize("family", families(OWN_CACHE))
def test_decoding_with_padding_is_bit_equal(family: str) -> None:
    model = family_model(family)
    parameters = inspect.signature(model.forward).parameters
    shards = shards_of(model)
    caches = [DynamicCache(config=model.config) for _ in (*shards, model)]
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, IDS.shape[1]))]:
        inputs = {"input_ids": IDS[:, start:end], "attention_mask": MASK[:, :end], "use_cache": True}
        if "position_ids" in parameters:
            inputs["position_ids"] = positions[:, start:end]
        with torch.no_grad():
            logits = model(**inputs, **{cache_name(model.forward): caches[-1]}).logits
        assert torch.equal(run_stages(shards, caches, **inputs), logits), (start, end)


def test_blocks_that_share_keys_and_values_must_stay_together() -> None:
    config = family_model("gemma3n_text", num_kv_shared_layers=2).config
    require_own_keys(Lineup(((0, 1, 2, 3), ()), 4), config)
    with pytest.raises(
        OwnershipError, match="blocks 0-3 of gemma3n_text share keys and values, which do not"
    ):
        require_own_keys(Lineup(((0, 1), (2, 3)), 4), config)


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_blocks_whose_keys_nobody_uses_may_be_on_several_ranks(family: str) -> None:
    require_own_keys(Lineup(((0, 1), (2, 3)), 4), family_model(family, num_kv_shared_layers=0).config)


@pytest.mark.skipif("dory" not in ENTRIES, reason="this transformers has no dory")
def test_a_rank_may_end_before_blocks_that_run_again_and_not_among_them() -> None:
    model = drawn_model(small_config("dory"))  # runs blocks 1 and 2 twice
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(run_stages(cut_into(model, [[0], [1, 2, 3]]), input_ids=IDS, use_cache=False), logits)
    with pytest.raises(PartialModelError, match="runs its block 1 2 times in one pass, so no rank can end"):
        run_stages(cut_into(model, [[0, 1], [2, 3]]), input_ids=IDS, use_cache=False)
