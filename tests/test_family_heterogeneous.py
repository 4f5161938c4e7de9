"""Every family that claims it builds heterogeneous blocks that compute what a model changed by hand computes.

The model changed by hand is the native one: blocks of other sizes come from whole native models of those
sizes, a part is removed by setting all of its weights to zero, and a hook puts a linear layer's result in the
place of a part's.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compare import assert_same_tensors
from support.families import NOT_CACHED, TEXT_FAMILIES, VISION_FAMILIES, drawn_model, family_config, redraw
from torch import nn

from patchers import AttentionConfig, BlockConfig, FFNConfig, ModelDescriptor, MoEConfig
from patchers.capability import layer_capabilities
from patchers.deci_x import as_described
from patchers.errors import BlockConfigError
from patchers.native import text_config_of
from sharded_ckpt import load_and_shard_model, save_sharded_checkpoint
from sharded_ckpt.saving.built_blocks import check_built

FAMILIES = (*TEXT_FAMILIES, *VISION_FAMILIES)
IDS = torch.tensor([[5, 60, 7, 81, 9, 100, 11, 12]])
NEW_TOKENS = 4

ATTENTION = {
    "native": AttentionConfig(),
    "no_op_attention": AttentionConfig(no_op=True),
    "linear_attention": AttentionConfig(replace_with_linear=True),
    "kv_heads": AttentionConfig(1),
    "query_heads": AttentionConfig(num_attention_heads=6),
}
FFN = {
    "native": FFNConfig(),
    "no_op_ffn": FFNConfig(no_op=True),
    "linear_ffn": FFNConfig(replace_with_linear=True),
    "ffn_width": FFNConfig(32),
    "experts": FFNConfig(moe=MoEConfig(num_local_experts=3)),
    "experts_per_token": FFNConfig(moe=MoEConfig(num_experts_per_tok=1)),
    "expert_width": FFNConfig(moe=MoEConfig(expert_intermediate_dim=24)),
    "shared_expert_width": FFNConfig(moe=MoEConfig(shared_expert_intermediate_dim=72)),
}
# The same by hand: under every name that a family may have for it, for all layers of a native model.
BY_HAND: dict[str, dict[str, Any]] = {
    "query_heads": {"num_attention_heads": 6, "head_dim": 16},
    "kv_heads": dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "attn_config.kv_n_heads"), 1
    ),
    "ffn_width": dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), 32
    ),
    "experts": dict.fromkeys(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "ffn_config.moe_num_experts",
        ),
        3,
    ),
    "experts_per_token": dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_k", "ffn_config.moe_top_k"), 1
    ),
    "expert_width": dict.fromkeys(("moe_intermediate_size", "ffn_config.ffn_hidden_size"), 24),
    "shared_expert_width": dict.fromkeys(
        (
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
        ),
        72,
    ),
}
# Their shared expert is always as wide as a routed one.
SHARED_AS_WIDE = ("llama4", "llama4_text", "hunyuan_v1_moe")
# Latent attention has as many KV heads as query heads.
AS_MANY_KV_HEADS = ("deepseek_v2", "deepseek_v3")
SHARED_COUNTS = ("n_shared_experts", "moe_num_shared_experts", "num_shared_expert")


def drawn(family: str, seed: int) -> list[tuple[str, str]]:
    """For each layer a kind of attention and a kind of FFN, out of those that it can have."""
    draw = random.Random(f"{family} {seed}")
    turns = [draw.sample(list(kinds), len(kinds)) for kinds in (ATTENTION, FFN)]
    chosen = []
    for index, can in enumerate(layer_capabilities(family_config(family))):
        options = [[kind for kind in turn if kind == "native" or can[kind] is True] for turn in turns]
        attention, ffn = (kinds[index % len(kinds)] for kinds in options)
        chosen.append((attention, ffn))
    return chosen


def block_config(family: str, attention: str, ffn: str) -> BlockConfig:
    if ffn == "expert_width" and family in SHARED_AS_WIDE:
        moe = MoEConfig(expert_intermediate_dim=24, shared_expert_intermediate_dim=24)
        return BlockConfig(ATTENTION[attention], FFNConfig(moe=moe))
    if attention == "query_heads" and family in AS_MANY_KV_HEADS:
        return BlockConfig(AttentionConfig(6, num_attention_heads=6), FFN[ffn])
    return BlockConfig(ATTENTION[attention], FFN[ffn])


def patched_model(family: str, kinds: list[tuple[str, str]]) -> Any:
    config = family_config(family)
    blocks = [block_config(family, *kind) for kind in kinds]
    with as_described(ModelDescriptor.from_config(config), config, blocks):
        return drawn_model(config)


def model_by_hand(family: str, kinds: list[tuple[str, str]], patched: Any) -> Any:
    config = family_config(family)
    descriptor = ModelDescriptor.from_config(config)
    model = drawn_model(config)
    layers = model.get_submodule(descriptor.layers)
    for index, sizes in enumerate(kinds):
        if set(sizes) & set(BY_HAND):
            other = drawn_model(changed_by_hand(family, sizes))
            layers[index] = other.get_submodule(descriptor.layers)[index]
    redraw(model)
    for index, (attention, ffn) in enumerate(kinds):
        kind = descriptor.kind_of(layers[index])
        for said, parts in ((attention, kind.attention), (ffn, kind.ffn)):
            if said.startswith(("no_op", "linear")):
                for part in parts:
                    silence(layers[index].get_submodule(part.name))
            if said.startswith("linear"):
                place = f"{descriptor.block_name(index)}.{parts[0].name}"
                (weight,) = patched.get_submodule(place).parameters()
                add_linear(layers[index].get_submodule(parts[0].name), weight)
    return model


def changed_by_hand(family: str, sizes: tuple[str, str]) -> Any:
    config = family_config(family)
    text = text_config_of(config)
    for size in set(sizes) & set(BY_HAND):
        fields = dict(BY_HAND[size])
        if size == "expert_width" and not hasattr(text, "moe_intermediate_size"):
            fields["intermediate_size"] = 24
        if size == "query_heads" and family in AS_MANY_KV_HEADS:
            fields["num_key_value_heads"] = 6
        if size == "query_heads" and not hasattr(text, "head_dim"):
            text.head_dim = 16
        for name in SHARED_COUNTS if size == "expert_width" else ():
            if getattr(text, name, None):
                fields[name] = 2 * getattr(text, name)
        for name, value in fields.items():
            owner, _, field = name.rpartition(".")
            holder = getattr(text, owner, None) if owner else text
            if hasattr(holder, field):
                listed = isinstance(getattr(holder, field), list)
                setattr(holder, field, [value] * text.num_hidden_layers if listed else value)
    return config


def silence(part: nn.Module) -> None:
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()


def add_linear(part: nn.Module, weight: torch.Tensor) -> None:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        image = nn.functional.linear(args[0] if args else kwargs["hidden_states"], weight)
        return (output[0] + image, *output[1:]) if isinstance(output, tuple) else output + image

    part.register_forward_hook(hook, with_kwargs=True)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def greedy_without_cache(model: Any, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], 1)
    return ids[:, -NEW_TOKENS:]


@pytest.mark.parametrize("family", FAMILIES)
def test_heterogeneous_blocks_compute_what_a_model_changed_by_hand_computes(family: str) -> None:
    kinds = drawn(family, seed=0)
    model = patched_model(family, kinds)
    by_hand = logits_of(model_by_hand(family, kinds, model), IDS)
    torch.testing.assert_close(
        logits_of(model, IDS), by_hand, rtol=1e-5, atol=1e-5, msg=lambda m: f"{kinds}: {m}"
    )
    native = drawn_model(family_config(family))
    assert decodes_as_without_cache(native) == (family not in NOT_CACHED)
    if family not in NOT_CACHED:
        assert decodes_as_without_cache(model), f"cached decode: {kinds}"
        assert decodes_padded_as_alone(model), f"left-padded batch: {kinds}"


def decodes_as_without_cache(model: Any) -> bool:
    return torch.equal(greedy(model, IDS), greedy_without_cache(model, IDS))


def decodes_padded_as_alone(model: Any) -> bool:
    short = IDS[:, 3:]
    batch = torch.cat([IDS, nn.functional.pad(short, (3, 0))])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    return torch.equal(greedy(model, batch, mask), torch.cat([greedy(model, IDS), greedy(model, short)]))


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "zamba2"])
def test_a_saved_heterogeneous_model_is_read_back_bit_by_bit(family: str, tmp_path: Path) -> None:
    kinds = drawn(family, seed=1)
    model = patched_model(family, kinds)
    model.config.block_configs = [block_config(family, *kind) for kind in kinds]
    save_sharded_checkpoint(model, tmp_path / "saved")
    again = load_and_shard_model("auto", tmp_path / "saved")
    assert_same_tensors(again, model)
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS)), kinds


def test_blocks_that_were_exchanged_in_memory_are_not_saved_under_another_description(tmp_path: Path) -> None:
    kinds = [("native", "native")] * 4
    model = patched_model("gpt_oss", kinds)
    model.config.block_configs = [block_config("gpt_oss", "native", "experts"), *[BlockConfig()] * 3]
    with pytest.raises(BlockConfigError) as refusal:
        save_sharded_checkpoint(model, tmp_path / "saved")
    assert "model.layers.0.mlp.router.weight is (4, 64), the config says (3, 64)" in str(refusal.value)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "llama4"])
def test_a_part_of_a_heterogeneous_model_is_held_against_its_own_blocks(family: str, tmp_path: Path) -> None:
    kinds = drawn(family, seed=2)
    model = patched_model(family, kinds)
    model.config.block_configs = [block_config(family, *kind) for kind in kinds]
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
