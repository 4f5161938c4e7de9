"""What blocks of a family may have otherwise than its config says: each is True, or the reason why not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.by_hand import (
    decodes_as_without_cache,
    decodes_padded_as_alone,
    logits_of,
    model_by_hand,
    patched_model,
)
from support.families import TEXT_FAMILIES, VISION_FAMILIES, drawn_model, family_config

from patchers import ModelDescriptor, capabilities, deci_x_patcher, infer_block_configs
from patchers.errors import FamilyError
from patchers.meta import build_on_meta
from patchers.names import block_of

pytestmark = pytest.mark.families
MOE_FAMILIES = [
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "hunyuan_v1_moe",
    "jamba",
    "llama4_text",
    "minimax",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
]


def no_op(part: str, index: int, layers: int) -> list[dict[str, Any]]:
    return [{part: {"no_op": True}} if i == index else {} for i in range(layers)]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return {family: capabilities(family_config(family)) for family in (*TEXT_FAMILIES, *VISION_FAMILIES)}


def count(found: dict[str, dict[str, Any]], *cells: str) -> int:
    return sum(any(found[family][cell] is True for cell in cells) for family in TEXT_FAMILIES)


def test_most_families_can_do_without_attention_or_ffn(found: dict[str, dict[str, Any]]) -> None:
    assert count(found, "no_op_attention") >= 56
    assert count(found, "no_op_ffn") >= 54
    assert count(found, "linear_attention") >= 55
    assert count(found, "linear_ffn") >= 52


def test_most_families_can_have_other_sizes(found: dict[str, dict[str, Any]]) -> None:
    assert count(found, "ffn_width", "expert_width") >= 55
    assert count(found, "kv_heads") >= 50


def test_every_family_of_experts_can_have_fewer(found: dict[str, dict[str, Any]]) -> None:
    for family in MOE_FAMILIES:
        for cell in ("experts", "experts_per_token", "expert_width"):
            assert found[family][cell] is True, (family, cell)
    others = set(TEXT_FAMILIES) - set(MOE_FAMILIES)
    assert not [family for family in others if found[family]["experts"] is True]


def test_every_refusal_says_why(found: dict[str, dict[str, Any]]) -> None:
    refusals = {why for can in found.values() for why in can.values() if why is not True}
    assert all(why.split()[0] in ("no", "in", "this", "Zamba2HybridLayer") for why in refusals)


REFUSED = {
    "minimax": ("attention", "in minimax a layer without it is not the identity"),
    "gemma3n_text": ("ffn", "in gemma3n_text a layer without it is not the identity"),
    "zamba2": ("attention", "Zamba2HybridLayer is not built from a config"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_claimed_is_refused_by_name(family: str, found: dict[str, dict[str, Any]]) -> None:
    part, why = REFUSED[family]
    assert why in str(found[family][f"no_op_{part}"])
    config = family_config(family)
    blocks = no_op(part, 0, config.num_hidden_layers)
    with deci_x_patcher(ModelDescriptor.from_config(config), blocks), pytest.raises(FamilyError, match=why):
        drawn_model(config)


SIZES_REFUSED = {
    "mamba": ({"attention": {"num_key_value_heads": 2}}, "no config field moves the KV heads of this layer"),
    "gpt2": ({"attention": {"num_key_value_heads": 2}}, "no config field moves the KV heads of this layer"),
    "bloom": ({"ffn": {"intermediate_size": 32}}, "no config field moves the FFN width of this layer"),
    "lfm2": ({"ffn": {"intermediate_size": 32}}, "no config field moves the FFN width of this layer"),
    "mixtral": (
        {"ffn": {"intermediate_size": 32}},
        "this layer is a mixture of experts: say the width",
    ),
    "llama": ({"ffn": {"moe": {"num_local_experts": 2}}}, "this layer is no mixture of experts"),
    "olmoe": (
        {"ffn": {"moe": {"shared_expert_intermediate_dim": 32}}},
        "shared_expert_intermediate_dim=32, but in olmoe this layer has no shared expert",
    ),
    "llama4_text": (
        {"ffn": {"moe": {"expert_intermediate_dim": 32}}},
        "expert_intermediate_dim=32 beside shared_expert_intermediate_dim=96, but in llama4_text the shared "
        "expert is as wide as a routed one",
    ),
    "deepseek_v3": (
        {"ffn": {"moe": {"expert_intermediate_dim": 32}}},
        "the width of the shared expert is n_shared_experts times that of a routed one",
    ),
}


@pytest.mark.parametrize("family", SIZES_REFUSED)
def test_a_size_that_a_layer_has_not_is_refused_by_name(family: str) -> None:
    block, why = SIZES_REFUSED[family]
    config = family_config(family)
    blocks = [{}] * 1 + [block] + [{}] * 2  # the first layer of deepseek is dense
    with (
        deci_x_patcher(ModelDescriptor.from_config(config), blocks),
        pytest.raises(FamilyError, match=f"block 1 asks for .*{re.escape(why)}"),
    ):
        drawn_model(config)


@pytest.mark.parametrize(
    ("moe", "why"),
    [
        ({"num_local_experts": 3}, "its experts come in n_group=2 groups of one size"),
        (
            {"num_local_experts": 2, "num_experts_per_tok": 2},
            "a token looks at 1 of them (topk_group) and must visit 2",
        ),
    ],
)
def test_groups_of_experts_stay_of_one_size_and_large_enough(moe: dict[str, int], why: str) -> None:
    config = family_config("deepseek_v3", n_group=2, topk_group=1)
    blocks = [{}, {"ffn": {"moe": moe}}, {}, {}]
    with (
        deci_x_patcher(ModelDescriptor.from_config(config), blocks),
        pytest.raises(FamilyError, match=re.escape(why)),
    ):
        drawn_model(config)


def test_an_attention_whose_keys_later_layers_use_stays() -> None:
    config = family_config("gemma4_text", num_kv_shared_layers=2)
    descriptor = ModelDescriptor.from_config(config)
    with (
        deci_x_patcher(descriptor, no_op("attention", 1, 4)),
        pytest.raises(FamilyError, match="later layers of this gemma4_text model use its keys and values"),
    ):
        drawn_model(config)
    fewer = [{}, {"attention": {"num_key_value_heads": 1}}, {}, {}]
    text = "block 1 has other KV heads, but later layers of this gemma4_text model use its keys"
    with deci_x_patcher(descriptor, fewer), pytest.raises(FamilyError, match=text):
        drawn_model(config)
    with deci_x_patcher(descriptor, no_op("attention", 3, 4)):
        assert drawn_model(config)


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("qwen3_moe", "moe_intermediate_size"),
        ("mixtral", "intermediate_size"),
        ("gpt_oss", "intermediate_size"),
    ],
)
def test_experts_may_have_a_width_that_no_grouped_kernel_takes(family: str, field: str) -> None:
    config = family_config(family, **{field: 12})
    can = capabilities(config)
    assert can["experts"] is True
    assert can["expert_width"] is True
    with deci_x_patcher(config, no_op("attention", 1, 4)):
        model = drawn_model(config)
    assert bool(logits_of(model).isfinite().all())


def test_falcon_with_alibi_is_described_like_falcon_with_rotary_positions() -> None:
    """It is falcon-rw: attention and FFN one after the other, as many KV heads as query heads."""
    rw = {"alibi": True, "new_decoder_architecture": False, "parallel_attn": False, "multi_query": False}
    config = family_config("falcon", **rw, bias=True, num_kv_heads=4)
    can = capabilities(config)
    assert {"no_op_attention", "linear_attention", "no_op_ffn", "linear_ffn", "ffn_width"} == {
        cell for cell, answer in can.items() if answer is True
    }
    kinds = [("no_op_attention", "ffn_width"), ("native", "no_op_ffn"), ("linear_attention", "native")]
    kinds += [("native", "linear_ffn")]
    model = patched_model(config, kinds)
    by_hand = model_by_hand(config, kinds, model)
    torch.testing.assert_close(logits_of(model), logits_of(by_hand), rtol=1e-5, atol=1e-5)
    assert decodes_as_without_cache(model)
    assert decodes_padded_as_alone(model)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gptj", "opt"])
def test_block_configs_read_off_a_family_without_kv_heads_describe_it(family: str) -> None:
    """Each of its query heads has keys and values of its own: that is said, and no change."""
    config = family_config(family)
    plain = drawn_model(config)
    blocks = infer_block_configs(plain.state_dict(), config.to_dict())
    assert {block.attention.num_key_value_heads for block in blocks} == {4}
    with deci_x_patcher(config, blocks):
        assert torch.equal(logits_of(drawn_model(config)), logits_of(plain))
    fewer = [{"attention": {"num_key_value_heads": 2}}] * 4
    with (
        deci_x_patcher(config, fewer),
        pytest.raises(FamilyError, match="no config field moves the KV heads"),
    ):
        drawn_model(config)


def test_an_attention_that_stores_its_keys_for_no_layer_of_the_model_may_go() -> None:
    """gemma4 has the last layer of each type store them in any case, for the assistant models beside it."""
    config = family_config("gemma4_text", num_kv_shared_layers=0)
    blocks = [{}, {}, {"attention": {"num_key_value_heads": 1}}, {"attention": {"no_op": True}}]
    with deci_x_patcher(ModelDescriptor.from_config(config), blocks):
        layers = drawn_model(config).model.layers
    assert layers[2].self_attn.k_proj.weight.shape == (16, 64)
    assert not list(layers[3].self_attn.parameters())


@pytest.mark.parametrize("family", ["qwen3_moe", "dbrx", "gpt_oss", "deepseek_v3"])
def test_the_number_of_visited_experts_is_seen_in_what_they_compute(family: str) -> None:
    """Of the experts of one token, exactly as many change its result as the block says."""
    for visited in (1, 3):
        blocks = [{}, {"ffn": {"moe": {"num_experts_per_tok": visited}}}, {}, {}]
        config = family_config(family)
        descriptor = ModelDescriptor.from_config(config)
        with deci_x_patcher(descriptor, blocks):
            model = drawn_model(config)
        layer = model.get_submodule(descriptor.block_name(1))
        assert experts_that_count(layer.get_submodule(descriptor.kind_of(layer).ffn[0].name)) == visited


def experts_that_count(ffn: Any, experts: int = 4) -> int:
    token = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
    stacked = [p for p in ffn.parameters() if p.numel() > 4096 and p.shape[0] in (experts, experts * 96)]
    seen = 0
    with torch.no_grad():
        before = run(ffn, token)
        for expert in range(experts):
            saved = [p.clone() for p in stacked]
            for p in stacked:
                rows = p.shape[0] // experts
                p[expert * rows : (expert + 1) * rows] += 1.0
            seen += not torch.equal(run(ffn, token), before)
            for p, old in zip(stacked, saved, strict=True):
                p.copy_(old)
    return seen


def run(ffn: Any, token: Any) -> Any:
    output = ffn(token)
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", [*TEXT_FAMILIES, *VISION_FAMILIES])
def test_the_block_that_a_name_tells_is_that_of_the_model(family: str) -> None:
    config = family_config(family)
    descriptor = ModelDescriptor.from_config(config)
    for name in build_on_meta(descriptor.model_class, config, config.dtype).state_dict():
        inside = name.removeprefix(f"{descriptor.layers}.")
        assert block_of(name) == (int(inside.partition(".")[0]) if inside != name else None), name
