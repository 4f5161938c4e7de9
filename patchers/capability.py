"""What a family of models can have otherwise in one block than in the others, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedConfig

from patchers.activation import patched_init
from patchers.descriptor import ModelDescriptor
from patchers.layer_maker import NO_INDEX, LayerMaker
from patchers.meta import build_on_meta
from patchers.probe import LayerKind
from patchers.size_fields import (
    EXPERT_WIDTH,
    EXPERTS,
    KV_HEADS,
    QUERY_HEADS,
    SHARED_WIDTH,
    TOP_K,
    WIDTH,
    LayerFields,
)
from patchers.size_marks import sides_of
from patchers.substitution import why_not_linear, why_not_removed

Capability = Literal[True] | str
"""True, or the reason why not."""

_SIZES = {
    "query_heads": (
        QUERY_HEADS,
        "no config field moves the query heads of a layer while each keeps its size",
    ),
    "kv_heads": (KV_HEADS, "no config field moves the KV heads of a layer"),
    "ffn_width": (WIDTH, "no config field moves the width of a dense FFN"),
    "experts": (EXPERTS, "no config field moves the number of experts"),
    "experts_per_token": (TOP_K, "no config field moves the number of experts that a token visits"),
    "expert_width": (EXPERT_WIDTH, "no config field moves the width of the experts"),
    "shared_expert_width": (SHARED_WIDTH, "no config field of its own moves the width of a shared expert"),
}


def capabilities(
    config: PreTrainedConfig, descriptor: ModelDescriptor | str = "auto"
) -> dict[str, Capability]:
    """Return what blocks of a model may have otherwise than its config says, each True or the reason why not.

    The sizes are `query_heads`, `kv_heads`, `ffn_width`, `experts`, `experts_per_token`, `expert_width` and
    `shared_expert_width`; the parts that may go or be replaced are `no_op_attention`, `linear_attention`,
    `no_op_ffn` and `linear_ffn`. What some layers of a model can and others cannot is True: `deci_x_patcher`
    refuses by name where a block asks for what its layer has not.

    Nothing is read but the config, and nothing is stored: the answers come from layers built on meta.

    Args:
        config: Of the model.
        descriptor: A `ModelDescriptor`, the name of a family, or `"auto"`.

    Raises:
        FamilyError: The layers of the model cannot be found, or not be run on meta.

    Example:
        >>> from transformers import Gemma3TextConfig, MiniMaxConfig
        >>> capabilities(Gemma3TextConfig(num_hidden_layers=2))["no_op_attention"]
        True
        >>> capabilities(MiniMaxConfig(num_hidden_layers=2))["no_op_attention"][:52]
        'in minimax a layer without it is not the identity: z'
    """
    layers = layer_capabilities(config, descriptor)
    return {cell: _best(layer[cell] for layer in layers) for cell in layers[0]}


def _best(found: Any) -> Capability:
    answers = list(found)
    return True if True in answers else answers[0]


def layer_capabilities(
    config: PreTrainedConfig, descriptor: ModelDescriptor | str = "auto"
) -> list[dict[str, Capability]]:
    """Return the capabilities of each layer of a model. See `capabilities`."""
    found = ModelDescriptor.of(descriptor, config)
    makers: list[LayerMaker] = []

    def record(layer: nn.Module, true_init: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        makers.append(LayerMaker(layer, true_init, args, kwargs))
        true_init(layer, *args, **kwargs)

    with patched_init(found.layer_classes, record):
        model = build_on_meta(found.model_class, config, config.dtype)
    known: dict[Any, dict[str, Capability]] = {}
    made = {id(make.layer): make for make in makers}
    layers = list(model.get_submodule(found.layers).children())
    answers = []
    for layer in layers:
        key = (type(layer), tuple(sides_of(layer).items()))
        if key not in known:
            known[key] = _of_layer(layer, made[id(layer)], found)
        answers.append(known[key])
    return _all_or_none(answers, made, layers)


def _all_or_none(
    answers: list[dict[str, Capability]], made: Mapping[int, LayerMaker], layers: list[nn.Module]
) -> list[dict[str, Capability]]:
    """Say no for all layers where one of them cannot be told which it is (zamba2, bert)."""
    for layer in layers:
        make, name = made[id(layer)], type(layer).__name__
        if make.config is None or make.index is NO_INDEX:
            told = "built from a config" if make.config is None else "told its layer index"
            return [dict.fromkeys(answer, f"{name} is not {told}") for answer in answers]
    return answers


def _of_layer(layer: nn.Module, make: LayerMaker, descriptor: ModelDescriptor) -> dict[str, Capability]:
    kind, family = descriptor.kind_of(layer), descriptor.family
    fields = LayerFields(make.seen, make.index, kind, make.on_meta)
    sizes: Mapping[str, Capability] = {
        cell: fields.find(size) is not None or why for cell, (size, why) in _SIZES.items()
    }
    return {**sizes, **_parts(kind, family)}


def _parts(kind: LayerKind, family: str) -> dict[str, Capability]:
    answers: dict[str, Capability] = {}
    for name, parts in (("attention", kind.attention), ("ffn", kind.ffn)):
        none = None if parts else f"this layer of {family} has no {name}"
        answers[f"no_op_{name}"] = none or why_not_removed(parts, family) or True
        answers[f"linear_{name}"] = none or why_not_linear(name, parts, family) or True
    return answers
