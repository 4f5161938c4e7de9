"""Families that claim it build heterogeneous blocks that compute what a model changed by hand computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.by_hand import (
    ATTENTION,
    block_config,
    block_configs,
    covering,
    decodes_as_without_cache,
    decodes_padded_as_alone,
    drawn,
    logits_of,
    model_by_hand,
    patched_model,
)
from support.compare import assert_same_tensors
from support.families import (
    NOT_CACHED,
    TEXT_FAMILIES,
    VISION_FAMILIES,
    drawn_model,
    family_config,
    why_not_run,
)
from support.families_table import CELLS, DOCUMENT, rows_of
from torch import nn

from patchers import BlockConfig, ModelDescriptor
from patchers.capability import layer_capabilities
from patchers.deci_x import as_described
from patchers.errors import BlockConfigError, FamilyError
from patchers.meta import build_on_meta
from sharded_ckpt import load_and_shard_model, save_sharded_checkpoint
from sharded_ckpt.saving.built_blocks import check_built

pytestmark = pytest.mark.families
FAMILIES = (*TEXT_FAMILIES, *VISION_FAMILIES)
TABLE = rows_of(DOCUMENT.read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_heterogeneous_blocks_compute_what_a_model_changed_by_hand_computes(family: str) -> None:
    """What the table says yes to is had by a layer of one of these models; what it denies is refused."""
    if why := why_not_run(family):
        pytest.skip(why)
    config = family_config(family)
    descriptor = ModelDescriptor.from_config(config)
    answers = layer_capabilities(config, descriptor)
    measured: set[str] = set()
    for kinds in covering(answers, seed=0, family=family):
        model = patched_model(config, kinds, descriptor)
        by_hand = logits_of(model_by_hand(config, kinds, model, descriptor))
        torch.testing.assert_close(
            logits_of(model), by_hand, rtol=1e-5, atol=1e-5, msg=lambda m, kinds=kinds: f"{kinds}: {m}"
        )
        if family not in NOT_CACHED:
            assert decodes_as_without_cache(model), f"cached decode: {kinds}"
            assert decodes_padded_as_alone(model), f"left-padded batch: {kinds}"
        measured |= {kind for layer in kinds for kind in layer}
    assert decodes_as_without_cache(drawn_model(config)) == (family not in NOT_CACHED)
    yes = {column for column, cells in CELLS.items() if measured & {*cells}}
    yes |= set() if family in NOT_CACHED else {"cached decode", "padded batch"}
    assert {column for column, cell in TABLE[family].items() if cell == "yes"} == {
        *yes,
        "sharded load",  # test_family_loading
        "save/reload",  # test_family_saving
    }
    for index, can in enumerate(answers):
        if can not in answers[:index]:
            for kind in (kind for kind, answer in can.items() if answer is not True):
                assert_refused(config, kind, index, len(answers), descriptor)


def assert_refused(config: Any, kind: str, index: int, count: int, descriptor: ModelDescriptor) -> None:
    """A layer that cannot be of a kind is not built; to remove what it has not leaves it as it is."""
    kinds = (kind, "native") if kind in ATTENTION else ("native", kind)
    asked = [BlockConfig()] * count
    asked[index] = block_config(config, *kinds)
    try:
        with as_described(descriptor, config, asked):
            built = build_on_meta(descriptor.model_class, config, config.dtype)
    except (FamilyError, BlockConfigError):
        return
    native = build_on_meta(descriptor.model_class, config, config.dtype)
    assert kind.startswith("no_op"), f"layer {index} was built as if it could be {kind}"
    assert [*built.state_dict()] == [*native.state_dict()]


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "zamba2"])
def test_a_saved_heterogeneous_model_is_read_back_bit_by_bit(family: str, tmp_path: Path) -> None:
    kinds = drawn(family_config(family), seed=1)
    model = patched_model(family_config(family), kinds)
    model.config.block_configs = block_configs(model.config, kinds)
    save_sharded_checkpoint(model, tmp_path / "saved")
    again = load_and_shard_model("auto", tmp_path / "saved")
    assert_same_tensors(again, model)
    if not why_not_run(family):
        assert torch.equal(logits_of(again), logits_of(model)), kinds


def test_blocks_that_were_exchanged_in_memory_are_not_saved_under_another_description(tmp_path: Path) -> None:
    kinds = [("native", "native")] * 4
    model = patched_model(family_config("gpt_oss"), kinds)
    model.config.block_configs = [block_config(model.config, "native", "experts"), *[BlockConfig()] * 3]
    with pytest.raises(BlockConfigError) as refusal:
        save_sharded_checkpoint(model, tmp_path / "saved")
    assert "model.layers.0.mlp.router.weight is (4, 64), the config says (3, 64)" in str(refusal.value)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "llama4"])
def test_a_part_of_a_heterogeneous_model_is_held_against_its_own_blocks(family: str, tmp_path: Path) -> None:
    kinds = drawn(family_config(family), seed=2)
    model = patched_model(family_config(family), kinds)
    model.config.block_configs = block_configs(model.config, kinds)
    save_sharded_checkpoint(model, tmp_path / "saved")
    for owned in ({0}, {1, 2}, set()):
        shard = load_and_shard_model("auto", tmp_path / "saved", owned)
        check_built(shard, shard.config)
    shard = load_and_shard_model("auto", tmp_path / "saved", {1})
    name = next(name for name, _ in shard.named_parameters() if ".layers.1." in name)
    owner, _, attribute = name.rpartition(".")
    setattr(shard.get_submodule(owner), attribute, nn.Parameter(torch.zeros(3, 3)))
    with pytest.raises(BlockConfigError, match=rf"{name} is \(3, 3\), the config says"):
        check_built(shard, shard.config)


UNUSUAL: list[tuple[str, dict[str, Any]]] = [
    ("falcon", {"new_decoder_architecture": False, "multi_query": True}),  # falcon-7b: num_kv_heads is idle
    ("granitemoehybrid", {"num_local_experts": 0}),  # granite-4.0-h-micro: no experts
    ("gemma4_text", {"enable_moe_block": True, "top_k_experts": 2}),
    ("nemotron_h", {"layers_block_type": ["attention", "moe", "mamba", "mlp"]}),
    ("deepseek_v3", {"q_lora_rank": None, "n_shared_experts": 2, "first_k_dense_replace": 2}),
    ("qwen3_moe", {"mlp_only_layers": [0, 2]}),
    ("gemma2", {"query_pre_attn_scalar": 64, "head_dim": 32}),
    ("phi3", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    ("opt", {"do_layer_norm_before": False}),
    ("glm4_moe", {"use_qk_norm": True, "attention_bias": True, "n_shared_experts": 2}),
]


@pytest.mark.parametrize(("family", "settings"), UNUSUAL)
def test_unusual_configs_of_a_family_are_exact_too(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = family_config(family, **settings)
    kinds = drawn(config, seed=7)
    model = patched_model(config, kinds)
    torch.testing.assert_close(logits_of(model), logits_of(model_by_hand(config, kinds, model)))
    assert decodes_as_without_cache(model)
    model.config.block_configs = block_configs(config, kinds)
    save_sharded_checkpoint(model, tmp_path / "saved", durable=False)
    assert_same_tensors(load_and_shard_model("auto", tmp_path / "saved"), model)
    odd = load_and_shard_model("auto", tmp_path / "saved", {1, 3})
    assert_same_tensors(odd, model, partial=True)
