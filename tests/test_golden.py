"""Published layouts give the outputs that others recorded with their own code.

`nemotron_nas*` are in the layout of the published Nemotron-NAS models, their outputs recorded from the
published DeciLM modelling code; `anymodel_*` were written and run by NVIDIA's own package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.compare import assert_same_tensors, tensors_in
from support.gloo import Gloo
from support.stages import run_stages
from transformers import DynamicCache, PreTrainedModel

from patchers.cache_names import cache_name
from patchers.substitutes import NoAttention
from sharded_ckpt import load_and_shard_model

GOLDEN = Path(__file__).parent / "data" / "golden"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir())
NO_OP_FIRST = ["anymodel_qwen3_tied", "nemotron_nas_tied_noop_first"]


class Golden:
    """One checkpoint and what is known of it."""

    def __init__(self, name: str) -> None:
        self.checkpoint = GOLDEN / name / "checkpoint"
        reference = load_file(GOLDEN / name / "reference.safetensors")
        self.input_ids, self.logits = reference["input_ids"], reference["logits"]
        self.greedy_tokens = reference["greedy_tokens"]
        self.prompt = self.greedy_tokens[:, : self.input_ids.shape[1]]
        self.new_tokens = self.greedy_tokens.shape[1] - self.prompt.shape[1]
        self.model: PreTrainedModel = load_and_shard_model("auto", self.checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_all_four_are_here() -> None:
    assert NAMES == ["anymodel_llama", "anymodel_qwen3_tied", "nemotron_nas", "nemotron_nas_tied_noop_first"]


def test_logits_are_the_recorded_ones(golden: Golden) -> None:
    with torch.no_grad():
        logits = golden.model(golden.input_ids).logits
    assert logits.dtype is torch.float32
    assert (logits - golden.logits).abs().max() <= 1e-5


@pytest.mark.parametrize("route", ["direct", "converted"])
def test_both_routes_agree_bit_for_bit(golden: Golden, route: Any) -> None:
    model = load_and_shard_model("auto", golden.checkpoint, dtype=torch.float32, route=route)
    assert_same_tensors(model, golden.model)


def test_greedy_decoding_gives_the_recorded_tokens(golden: Golden) -> None:
    tokens = golden.model.generate(
        golden.prompt,
        attention_mask=torch.ones_like(golden.prompt),
        max_new_tokens=golden.new_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(tokens, golden.greedy_tokens)


def test_token_by_token_without_position_ids_equals_uncached(golden: Golden) -> None:
    cache, ids = DynamicCache(config=golden.model.config), golden.greedy_tokens
    name = cache_name(golden.model.forward)
    with torch.no_grad():
        uncached = golden.model(ids).logits
        length = golden.prompt.shape[1]
        logits = [golden.model(ids[:, :length], **{name: cache}).logits]
        for step in range(length, ids.shape[1]):
            assert cache.get_seq_length() == step
            logits.append(golden.model(ids[:, step : step + 1], **{name: cache}).logits)
    cached = torch.cat(logits, dim=1)
    assert (cached - uncached).abs().max() <= 1e-5
    assert torch.equal(cached.argmax(-1)[:, length - 1 : -1], ids[:, length:])


def test_left_padded_batch_decodes_like_each_prompt_alone(golden: Golden) -> None:
    pad, short = 3, golden.prompt[:1, 3:]
    padded = torch.cat([torch.zeros(1, pad, dtype=torch.long), short], dim=1)
    batch = torch.cat([golden.prompt[:1], padded])
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0
    options = {"max_new_tokens": golden.new_tokens, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    together = golden.model.generate(batch, attention_mask=mask, **options)
    for row, prompt in enumerate((golden.prompt[:1], short)):
        alone = golden.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        new = alone.sequences[0, prompt.shape[1] :]
        assert torch.equal(together.sequences[row, batch.shape[1] :], new)
        for ours, theirs in zip(together.logits, alone.logits, strict=True):
            assert (ours[row] - theirs[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", NO_OP_FIRST)
def test_removed_attention_comes_first_in_two_of_them(name: str) -> None:
    model = load_and_shard_model("auto", GOLDEN / name / "checkpoint")
    assert isinstance(model.model.layers[0].self_attn, NoAttention)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_logits_through_shards_are_the_recorded_ones(golden: Golden, ranks: int) -> None:
    shards = shards_of(golden, ranks)
    assert (run_stages(shards, input_ids=golden.input_ids) - golden.logits).abs().max() <= 1e-5


@pytest.mark.parametrize("ranks", [2, 3])
def test_decoding_through_shards_counts_right_on_every_stage(golden: Golden, ranks: int) -> None:
    shards = shards_of(golden, ranks)
    caches = [DynamicCache(config=shard.config) for shard in shards]
    ids, length = golden.greedy_tokens, golden.prompt.shape[1]
    with torch.no_grad():
        uncached = golden.model(ids).logits
    logits = [run_stages(shards, caches, input_ids=ids[:, :length])]
    for step in range(length, ids.shape[1]):
        assert {cache.get_seq_length() for cache in caches} == {step}
        logits.append(run_stages(shards, caches, input_ids=ids[:, step : step + 1]))
    assert (torch.cat(logits, dim=1) - uncached).abs().max() <= 1e-5


def shards_of(golden: Golden, ranks: int) -> list[PreTrainedModel]:
    parts = torch.arange(golden.model.config.num_hidden_layers).tensor_split(ranks)
    return [
        load_and_shard_model("auto", golden.checkpoint, set(part.tolist()), dtype=torch.float32)
        for part in parts
    ]


def _load(checkpoint: str) -> dict[str, torch.Tensor]:
    return tensors_in(load_and_shard_model("auto", checkpoint))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_union_of_shards_is_the_whole(name: str, world_size: int, gloo: Gloo) -> None:
    checkpoint = GOLDEN / name / "checkpoint"
    whole = tensors_in(load_and_shard_model("auto", checkpoint))
    shards = gloo.run_ok(_load, str(checkpoint), world_size=world_size)
    union = {key: tensor for shard in shards for key, tensor in shard.items()}
    assert set(union) == set(whole)
    for shard in shards:
        assert all(torch.equal(tensor, whole[key]) for key, tensor in shard.items())
    counts = [sum(key in shard for shard in shards) for key in whole if key.startswith("model.layers.")]
    assert set(counts) == {1}
