"""The per-layer dialect, transformers' own: `{"03": {"intermediate_size": 4096, "skip": ["attention"]}}`.

Sparse: only what differs from the base config is said, in the family's own field names. Source:
`transformers/integrations/heterogeneity/configuration_utils.py` (transformers 5.23).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from patchers.base_sizes import BaseSizes
from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig, MoEConfig
from patchers.block_fields import at_block
from patchers.dialects.block_list import refuse_lost, refuse_unknown
from patchers.dialects.dialect import Dialect
from patchers.errors import BlockConfigError

_NAME = Dialect.PER_LAYER.value
_SKIPPABLE = ("attention", "mlp")
# NVIDIA's package writes this width for families that have no shared expert at all.
_NO_SHARED_EXPERT = 8192


def read_per_layer(overrides: Mapping[Any, Any], base: BaseSizes) -> list[BlockConfig]:
    """Read a `per_layer_config`: from layers, as whole numbers or strings of them, to what differs there.

    Raises:
        BlockConfigError: A key is no layer of the model or comes twice, or an entry cannot be built.
    """
    entries: dict[int, Mapping[str, Any]] = {}
    for key, entry in overrides.items():
        index = _layer_index(key, base.num_hidden_layers)
        if index in entries:
            raise BlockConfigError(f"per_layer_config says layer {index} twice (key {key!r})")
        entries[index] = entry
    blocks = []
    for index in range(base.num_hidden_layers):
        with at_block(index):
            blocks.append(read_entry(entries.get(index, {}), base))
    return blocks


def read_entry(entry: Mapping[str, Any], base: BaseSizes) -> BlockConfig:
    """Read what one layer says.

    Raises:
        BlockConfigError: A field cannot differ between layers here, or what is skipped is unknown.
    """
    if not isinstance(entry, Mapping):
        raise BlockConfigError(f"an entry of per_layer_config must be a mapping, found {entry!r}")
    skipped = _skipped(entry.get("skip", ()))
    known = frozenset(_size_fields(base)) | {"skip"}
    # A field that repeats the base value says nothing, and transformers drops it; another would be ignored.
    differing = {
        name: value for name, value in entry.items() if name not in known and not _is_base(name, value, base)
    }
    refuse_unknown(differing, known, "the layer", Dialect.PER_LAYER)
    heads, queries = (entry.get(name) for name in _head_fields(base))
    attention = AttentionConfig(heads, no_op="attention" in skipped, num_attention_heads=queries)
    return BlockConfig(
        attention,
        FFNConfig(no_op=True) if "mlp" in skipped else _read_ffn(entry, base),
    )


def write_per_layer(blocks: Sequence[BlockConfig], base: BaseSizes) -> dict[str, dict[str, Any]]:
    """Write a `per_layer_config`, its keys padded with zeros so that they sort as numbers.

    Raises:
        BlockConfigError: A block has something that this dialect cannot say, such as a linear replacement.
    """
    entries: dict[int, dict[str, Any]] = {}
    for index, block in enumerate(blocks):
        with at_block(index):
            entry = write_entry(block, base)
        if entry:
            entries[index] = entry
    digits = len(str(max(entries, default=0)))
    return {str(index).zfill(digits): entry for index, entry in entries.items()}


def write_entry(block: BlockConfig, base: BaseSizes) -> dict[str, Any]:
    """Write what one layer has otherwise than the base config.

    Raises:
        BlockConfigError: The block has something that this dialect cannot say.
    """
    attention, ffn = block.attention, block.ffn
    for name, linear, extra in (
        ("attention", attention.replace_with_linear, attention.extra),
        ("ffn", ffn.replace_with_linear, ffn.extra),
    ):
        if linear:
            raise BlockConfigError(
                f"{name}.replace_with_linear cannot be said in {_NAME}; write nemotron-nas, anymodel or "
                "megatron"
            )
        refuse_lost(extra, name, {}, Dialect.PER_LAYER)
    heads = (attention.num_key_value_heads, attention.num_attention_heads)
    said: dict[str, Any] = dict(zip(_head_fields(base), heads, strict=True))
    said.update(_written_width(ffn, base) if ffn.moe is None else _written_moe(ffn.moe, base))
    sizes = {name: size for name, size in said.items() if size is not None and not _is_base(name, size, base)}
    skip = [name for name, gone in zip(_SKIPPABLE, (attention.no_op, ffn.no_op), strict=True) if gone]
    return {**sizes, "skip": skip} if skip else sizes


def _layer_index(key: Any, layers: int) -> int:
    number = int(key) if isinstance(key, str) and key.isdecimal() else key
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < layers:
        raise BlockConfigError(
            f"per_layer_config has the key {key!r}; its keys are the layers 0 to {layers - 1} "
            f"(num_hidden_layers={layers})"
        )
    return number


def _skipped(skip: Any) -> frozenset[str]:
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        raise BlockConfigError(
            f"skip={skip!r} is not a list of names; write {list(_SKIPPABLE)} or one of them"
        )
    names = frozenset(skip)
    if unknown := sorted(map(str, names.difference(_SKIPPABLE))):
        raise BlockConfigError(
            f"skip names {', '.join(unknown)}; what can be skipped is {' and '.join(_SKIPPABLE)}"
        )
    return names


def _is_base(name: str, value: Any, base: BaseSizes) -> bool:
    return name in base.raw and base.raw[name] == value


def _size_fields(base: BaseSizes) -> set[str]:
    return {*_head_fields(base), base.names.intermediate_size, *_moe_fields(base)}


def _head_fields(base: BaseSizes) -> tuple[str, str]:
    """The family's names of KV heads and query heads."""
    return base.names.num_key_value_heads, base.names.num_attention_heads


def _moe_fields(base: BaseSizes) -> dict[str, str]:
    """From the family's names to those of `MoEConfig`; the shared expert only where it has a field."""
    names = base.names
    if base.moe is None:
        return {}
    fields = {
        names.num_experts: "num_local_experts",
        names.num_experts_per_tok: "num_experts_per_tok",
        names.expert_intermediate_size: "expert_intermediate_dim",
    }
    if names.shared_expert_intermediate_size in base.raw:
        fields[names.shared_expert_intermediate_size] = "shared_expert_intermediate_dim"
    return fields


def _read_ffn(entry: Mapping[str, Any], base: BaseSizes) -> FFNConfig:
    moe_fields = _moe_fields(base)
    experts = {field: entry[name] for name, field in moe_fields.items() if entry.get(name) is not None}
    dense = base.names.intermediate_size
    width = None if dense in moe_fields else entry.get(dense)
    return FFNConfig(width, moe=MoEConfig(**experts) if experts else None)


def _written_width(ffn: FFNConfig, base: BaseSizes) -> dict[str, Any]:
    name, width = base.names.intermediate_size, ffn.intermediate_size
    if width is not None and base.moe is not None:
        means_experts = name == base.names.expert_intermediate_size
        if means_experts or width == base.intermediate_size:
            why = "says the width of the experts" if means_experts else "of the base config is the same"
            raise BlockConfigError(
                f"ffn.intermediate_size={width}: that this block is dense cannot be said in {_NAME}, since "
                f"{name} {why}; write anymodel"
            )
    return {name: width}


def _written_moe(moe: MoEConfig, base: BaseSizes) -> dict[str, Any]:
    if base.moe is None:
        raise BlockConfigError(
            f"ffn.moe cannot be said in {_NAME}, since the base config has no field for experts; write "
            "anymodel"
        )
    fields = _moe_fields(base)
    shared, general = moe.shared_expert_intermediate_dim, base.moe.shared_expert_intermediate_dim
    said_by_base = (None, general) if general else (None, 0, _NO_SHARED_EXPERT)
    if "shared_expert_intermediate_dim" not in fields.values() and shared not in said_by_base:
        raise BlockConfigError(
            f"ffn.moe.shared_expert_intermediate_dim={shared} cannot be said in {_NAME}, since the base "
            "config has no field for it; write anymodel"
        )
    return {name: getattr(moe, field) for name, field in fields.items()}
