"""Heterogeneous models beside native ones that were changed by hand.

The model changed by hand is the native one: blocks of other sizes come from whole native models of those
sizes, a part is removed by setting all of its weights to zero, and a hook puts a linear layer's result in the
place of a part's.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from patchers import AttentionConfig, BlockConfig, FFNConfig, ModelDescriptor, MoEConfig
from patchers.capability import Capability, layer_capabilities
from patchers.deci_x import as_described
from patchers.native import text_config_of
from support.families import drawn_model, redraw

IDS = torch.tensor([[5, 60, 7, 81, 9, 100, 11, 12]])
NEW_TOKENS = 4
Kinds = list[tuple[str, str]]
"""For each layer a kind of attention and a kind of FFN."""

ATTENTION = {
    "native": AttentionConfig(),
    "no_op_attention": AttentionConfig(no_op=True),
    "linear_attention": AttentionConfig(replace_with_linear=True),
    "kv_heads": AttentionConfig(1),
    "query_heads": AttentionConfig(num_attention_heads=8),
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
    "query_heads": {"num_attention_heads": 8, "swa_num_attention_heads": 8},
    "kv_heads": dict.fromkeys(
        (
            "num_key_value_heads",
            "num_kv_heads",
            "num_global_key_value_heads",
            "swa_num_key_value_heads",
            "attn_config.kv_n_heads",
        ),
        1,
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
SHARED_AS_WIDE = ("llama4_text", "hunyuan_v1_moe", "deepseek_v4")
SHARED_COUNTS = ("n_shared_experts", "moe_num_shared_experts", "num_shared_expert", "num_shared_experts")

Answers = list[dict[str, Capability]]
"""What each layer can have otherwise: `layer_capabilities`."""


def drawn(config: PreTrainedConfig, seed: int) -> Kinds:
    """For each layer, kinds out of those that it can have."""
    return next(_models(layer_capabilities(config), seed, config.model_type))


def covering(answers: Answers, seed: int, family: str) -> list[Kinds]:
    """As many models as it takes until every kind was had by some layer that can."""
    missing = {kind for layer in answers for kind, answer in layer.items() if answer is True}
    models = []
    for kinds in _models(answers, seed, family):
        models.append(kinds)
        missing -= {kind for layer in kinds for kind in layer}
        if not missing:
            return models
    raise AssertionError(f"no model has {missing}")


def _models(answers: Answers, seed: int, family: str) -> Iterator[Kinds]:
    """Draw models without end; a layer prefers the kinds that were had least often so far."""
    draw = random.Random(f"{family} {seed}")
    had: dict[str, int] = {}
    while True:
        kinds: list[tuple[str, str]] = [("", "")] * len(answers)
        for index in draw.sample(range(len(answers)), len(answers)):
            chosen = []
            for part in (ATTENTION, FFN):
                can = [kind for kind in part if kind == "native" or answers[index][kind] is True]
                chosen.append(min(draw.sample(can, len(can)), key=lambda kind: had.get(kind, 0)))
                had[chosen[-1]] = had.get(chosen[-1], 0) + 1
            kinds[index] = (chosen[0], chosen[1])
        yield kinds


def block_config(config: PreTrainedConfig, attention: str, ffn: str) -> BlockConfig:
    """A block of these kinds."""
    text = text_config_of(config)
    family = text.model_type
    if ffn == "expert_width" and family in SHARED_AS_WIDE:
        moe = MoEConfig(expert_intermediate_dim=24, shared_expert_intermediate_dim=24)
        return BlockConfig(ATTENTION[attention], FFNConfig(moe=moe))
    if attention == "query_heads" and has_as_many_kv_heads(text):
        return BlockConfig(AttentionConfig(8, num_attention_heads=8), FFN[ffn])
    return BlockConfig(ATTENTION[attention], FFN[ffn])


def block_configs(config: PreTrainedConfig, kinds: Kinds) -> list[BlockConfig]:
    """A block config for each layer."""
    return [block_config(config, *kind) for kind in kinds]


def patched_model(config: PreTrainedConfig, kinds: Kinds, descriptor: ModelDescriptor | None = None) -> Any:
    """The model that the library builds."""
    descriptor = descriptor or ModelDescriptor.from_config(config)
    with as_described(descriptor, config, block_configs(config, kinds)):
        return drawn_model(config)


def model_by_hand(
    config: PreTrainedConfig, kinds: Kinds, patched: Any, descriptor: ModelDescriptor | None = None
) -> Any:
    """The native model, changed by hand; linear layers are those of the patched one."""
    descriptor = descriptor or ModelDescriptor.from_config(config)
    model = drawn_model(config)
    layers = model.get_submodule(descriptor.layers)
    for index, sizes in enumerate(kinds):
        if set(sizes) & set(BY_HAND):
            other = drawn_model(changed_by_hand(config, sizes))
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


def changed_by_hand(config: PreTrainedConfig, sizes: tuple[str, str]) -> PreTrainedConfig:
    """A config that says these sizes for all layers."""
    config = copy.deepcopy(config)
    text = text_config_of(config)
    for size in set(sizes) & set(BY_HAND):
        fields = dict(BY_HAND[size])
        if size == "expert_width" and not hasattr(text, "moe_intermediate_size"):
            fields["intermediate_size"] = 24
        if size == "query_heads" and has_as_many_kv_heads(text):
            fields["num_key_value_heads"] = 8
        if size == "query_heads":
            fields["head_dim"] = getattr(text, "head_dim", None) or 16
            text.head_dim = fields["head_dim"]
        for name in SHARED_COUNTS if size == "expert_width" else ():
            if getattr(text, name, None):
                was = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
                fields[name] = was * getattr(text, name) // 24  # the shared expert stays as wide
        for name, value in fields.items():
            owner, _, field = name.rpartition(".")
            holder = getattr(text, owner, None) if owner else text
            if hasattr(holder, field):
                listed = isinstance(getattr(holder, field), list)
                setattr(holder, field, [value] * text.num_hidden_layers if listed else value)
    return config


def has_as_many_kv_heads(text: PreTrainedConfig) -> bool:
    """Whether a config says as many KV heads as query heads: latent attention always does."""
    kv_heads = getattr(text, "num_key_value_heads", None)
    return kv_heads is not None and kv_heads == text.num_attention_heads


def silence(part: nn.Module) -> None:
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()


def add_linear(part: nn.Module, weight: torch.Tensor) -> None:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        image = nn.functional.linear(args[0] if args else kwargs["hidden_states"], weight)
        return (output[0] + image, *output[1:]) if isinstance(output, tuple) else output + image

    part.register_forward_hook(hook, with_kwargs=True)


def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The logits of an uncached forward."""
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


def decodes_as_without_cache(model: Any) -> bool:
    return torch.equal(greedy(model, IDS), greedy_without_cache(model, IDS))


def decodes_padded_as_alone(model: Any) -> bool:
    short = IDS[:, 3:]
    batch = torch.cat([IDS, nn.functional.pad(short, (3, 0))])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    return torch.equal(greedy(model, batch, mask), torch.cat([greedy(model, IDS), greedy(model, short)]))
