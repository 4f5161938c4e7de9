"""Costs counted on the native model, without weights, and measured on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.families import family_config, family_model
from support.tiny import BLOCKS, block_shapes, heterogeneous_checkpoint, tiny_config

from patchers.cache_names import cache_of
from patchers.errors import ConfigError
from sharded_ckpt import load_model_config, plan_ownership
from sharded_ckpt.ownership import ModelCosts, costs_of, measure_block_times, skeleton_costs

BATCH, LENGTH = 2, 40


def cached_bytes(cache: Any) -> list[int]:
    """What each layer of a real cache holds."""
    return [sum(tensor.nbytes for tensor in tensors_in(vars(layer))) for layer in cache.layers]


def tensors_in(held: Any) -> list[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        return [held]
    values = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else []
    return [tensor for value in values for tensor in tensors_in(value)]


@pytest.mark.parametrize(
    "family",
    # plain, learned positions, windows, experts, latent attention, linear attention, state space, two mixers
    ["llama", "gpt2", "gemma2", "qwen3_moe", "deepseek_v3", "qwen3_next", "mamba", "falcon_h1"],
)
def test_weights_and_cache_of_any_family_are_what_a_real_model_takes(family: str) -> None:
    model = family_model(family)
    with torch.no_grad():
        output = model(torch.randint(3, 100, (BATCH, LENGTH)), use_cache=True)
    weights = skeleton_costs(model.config, dtype=torch.float32)
    full = skeleton_costs(model.config, by="bytes+kv", batch=BATCH, length=LENGTH, dtype=torch.float32)
    cached = [int(after - before) for before, after in zip(weights.blocks, full.blocks, strict=True)]
    assert cached == cached_bytes(cache_of(output))
    parameters = skeleton_costs(model.config, by="parameters")
    head = model.get_output_embeddings().weight.numel() if model.config.tie_word_embeddings else 0
    assert parameters.total == model.num_parameters() + head
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert weights.total == held + 4 * head


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_formulas_agree_with_the_native_model(family: str) -> None:
    config = tiny_config(family, dtype="bfloat16", layers=2, hidden_size=1024, intermediate_size=4096)
    for by in ("bytes", "parameters", "count", "bytes+kv"):
        formula = costs_of(config, by=by, length=8)
        exact = skeleton_costs(config, by=by, length=8)
        assert formula.blocks == pytest.approx(exact.blocks, rel=1e-3)  # qwen's biases and norms of heads
        assert (formula.embedding, formula.head) == (exact.embedding, exact.head)


def test_heterogeneous_blocks_count_as_what_they_are(tmp_path: Any) -> None:
    folder = heterogeneous_checkpoint(tmp_path)
    sizes = [0] * len(BLOCKS)
    for name, shape in block_shapes(tiny_config(layers=len(BLOCKS)), BLOCKS).items():
        if ".layers." in name:
            sizes[int(name.split(".")[2])] += 4 * torch.Size(shape).numel()
    by_config = plan_ownership(folder, 3)
    assert by_config.costs == tuple(sizes)
    assert skeleton_costs(load_model_config(folder)).blocks == tuple(sizes)
    full = costs_of(folder, by="bytes+kv", batch=BATCH, length=LENGTH)
    cached = [4 * BATCH * LENGTH * 2 * 16 * (kv if isinstance(kv, int) else 0) for kv, _ in BLOCKS]
    assert full.blocks == tuple(map(sum, zip(sizes, cached, strict=True)))
    plan = plan_ownership(folder, 2, by="flops", batch=BATCH, length=LENGTH, budgets="1MB")
    assert plan.memory == full


def test_what_cannot_be_counted_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="the formulas count blocks of the llama shape, not those"):
        costs_of({"model_type": "gpt2", "num_hidden_layers": 2})
    with pytest.raises(ConfigError, match="cannot be counted by 'flops' on the skeleton of a gpt2 model; "):
        costs_of(family_config("gpt2"), by="flops")
    with pytest.raises(ConfigError, match="the cache of a minimax model is a MiniMaxCache that does not"):
        skeleton_costs(family_config("minimax"), by="bytes+kv")
    with pytest.raises(ConfigError, match="costs cannot be counted of a int; give a config, a checkpoint"):
        plan_ownership(3, 2)  # type: ignore[arg-type]
    quantised = tiny_config().to_dict() | {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(ConfigError, match="the weights are quantised by awq, which is not read here"):
        costs_of(quantised)


def test_weights_that_are_dequantised_count_as_they_are_in_memory() -> None:
    config = tiny_config().to_dict()
    fp8 = config | {"quantization_config": {"quant_method": "fp8"}}
    assert costs_of(fp8, by="bytes+kv") == costs_of(config, by="bytes+kv")


# Time -----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take as long as other work on the machine lets them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_block_that_works_longer_is_measured_as_dearer() -> None:
    blocks = [{"ffn": {"intermediate_size": 16384}}, {"ffn": {"no_op": True}}] * 2
    config = tiny_config(hidden_size=512)
    times = measure_block_times(config, length=64, block_configs=blocks, repeats=5)
    assert times.by == "seconds"
    wide, without, wide_again, _ = times.blocks
    assert wide == wide_again > 3 * without > 0  # alike blocks are measured once
    assert min(times.embedding, times.head) > 0
    assert "ms" in str(plan_ownership(times, 2))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "falcon_h1", "gemma2"])
def test_a_step_of_decoding_is_measured_for_any_family(family: str) -> None:
    times = measure_block_times(family_config(family), batch=2, length=1, past=16, repeats=2)
    assert min(times.blocks) > 0
    kinds = {"llama": 1, "gpt2": 1, "qwen3_moe": 1, "falcon_h1": 1, "gemma2": 2}
    assert len(set(times.blocks)) == kinds[family]


@pytest.mark.usefixtures("one_thread")
def test_the_times_of_the_parts_add_up_to_that_of_the_model() -> None:
    model = family_model("llama", hidden_size=256, intermediate_size=1024, head_dim=64, vocab_size=2048)
    tokens = torch.randint(3, 100, (2, 256))
    seconds = []
    with torch.no_grad():
        for _ in range(7):
            began = time.perf_counter()
            model(tokens, use_cache=False)
            seconds.append(time.perf_counter() - began)
    measured = measure_block_times(model.config, batch=2, length=256, dtype=torch.float32).total
    assert 0.3 < measured / statistics.median(seconds) < 3  # the machine has other work, too


def test_nothing_is_not_measured() -> None:
    with pytest.raises(ConfigError, match="length is 0; there is nothing to measure"):
        measure_block_times(tiny_config(), length=0)


def test_model_costs_know_their_ends() -> None:
    assert ModelCosts((3,), 1, 2).loads == (6,)
    assert ModelCosts((3, 4, 5), 1, 2, everywhere=7).loads == (4, 4, 7)
    assert ModelCosts((3, 4, 5), 1, 2, everywhere=7).total == 22
