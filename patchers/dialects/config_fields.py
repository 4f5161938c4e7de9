"""Block configs as fields of a `config.json`: reading them, writing them, checking what a caller gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from patchers.base_sizes import BaseSizes, FieldNames
from patchers.block_config import AttentionConfig, BlockConfig, MoEConfig
from patchers.block_fields import at_block, check_groups
from patchers.dialects.block_list import read_block, write_block
from patchers.dialects.detection import (
    BLOCK_CONFIGS,
    MEGATRON_JSON,
    PER_LAYER_CONFIG,
    detect_dialect,
    dialect_of,
    fields_present,
)
from patchers.dialects.dialect import LAYOUTS, Dialect
from patchers.dialects.per_layer import read_entry, read_per_layer, write_entry, write_per_layer
from patchers.errors import BlockConfigError

_Entry = BlockConfig | Mapping[str, Any]


def read_block_configs(
    config: Mapping[str, Any], names: FieldNames | None = None
) -> tuple[list[BlockConfig], Dialect] | None:
    """Read the block configs of a raw `config.json`, one for each layer, and the dialect that they are in.

    Args:
        config: The config as a mapping.
        names: The family's own field names; found by `FieldNames.of` when not given.

    Returns:
        The blocks and their dialect, or None for a config that says nothing of single blocks.

    Raises:
        BlockConfigError: The block configs are not one for each layer; a field is unknown, not built or out
            of range; or they are said in two fields that disagree.

    Example:
        >>> base = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64}
        >>> blocks, dialect = read_block_configs({**base, "per_layer_config": {"1": {"skip": ["mlp"]}}})
        >>> blocks
        [BlockConfig(), BlockConfig(ffn=FFNConfig(no_op=True))]
    """
    dialect = detect_dialect(config)
    if dialect is None:
        _refuse_nested(config)
        return None
    base = BaseSizes.of(config, names)
    first, *others = fields_present(config)
    blocks = _read_field(first, config[first], dialect, base)
    for other in others:
        _refuse_disagreement(blocks, _read_field(other, config[other], dialect, base), first, other, base)
    return blocks, dialect


def decoder_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config that say its decoder layers.

    Of a nested (vision-language) config these are the fields of its text config, with the block configs that
    the outer one says.

    Raises:
        BlockConfigError: Both say block configs, and not the same.

    Example:
        >>> decoder_fields({"block_configs": [], "text_config": {"num_hidden_layers": 0}})
        {'num_hidden_layers': 0, 'block_configs': []}
    """
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return dict(config)
    outer = {name: config[name] for name in fields_present(config)}
    for name, value in outer.items():
        if nested.get(name) not in (None, value):
            raise BlockConfigError(f"{name} and text_config.{name} disagree; remove the one that is wrong")
    return {**nested, **outer}


def parse_blocks(
    blocks: Sequence[_Entry] | Mapping[Any, Any],
    base: Mapping[str, Any],
    dialect: Dialect | str | None = None,
    names: FieldNames | None = None,
) -> list[BlockConfig]:
    """Turn block configs that a caller gives into `BlockConfig`s, one for each layer.

    Args:
        blocks: For each layer a `BlockConfig` or a dict in any dialect, mixed at will; or the sparse mapping
            of a `per_layer_config`.
        base: The config of the model as a mapping.
        dialect: The dialect of the dicts; told entry by entry when not given.
        names: The family's own field names; found by `FieldNames.of` when not given.

    Raises:
        BlockConfigError: There are not as many entries as layers, or an entry is wrong; the message names the
            block and the field.

    Example:
        >>> base = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64}
        >>> parse_blocks([BlockConfig(), {"attention": {"n_heads_in_group": 4}}], base)
        [BlockConfig(), BlockConfig(attention=AttentionConfig(num_key_value_heads=2))]
    """
    return _parse(blocks, BaseSizes.of(base, names), None if dialect is None else Dialect(dialect))


def write_block_configs(
    blocks: Sequence[_Entry],
    dialect: Dialect | str,
    base: Mapping[str, Any],
    names: FieldNames | None = None,
) -> dict[str, Any]:
    """Return the fields that say these blocks in a `config.json`.

    Drop all `CONFIG_FIELDS` of a config before setting them, or it may say its blocks twice.

    Args:
        blocks: One for each layer.
        dialect: The dialect to write.
        base: The config of the model as a mapping; it stays as it is.
        names: The family's own field names; found by `FieldNames.of` when not given.

    Raises:
        BlockConfigError: A block has something that the dialect cannot say; the message names block and
            field.

    Example:
        >>> base = {"num_hidden_layers": 2, "num_key_value_heads": 8, "intermediate_size": 64}
        >>> write_block_configs([BlockConfig(), {"ffn": {"intermediate_size": 32}}], "per-layer", base)
        {'per_layer_config': {'1': {'intermediate_size': 32}}}
    """
    dialect, sizes = Dialect(dialect), BaseSizes.of(base, names)
    parsed = _parse(blocks, sizes, None)
    if dialect is Dialect.PER_LAYER:
        return {PER_LAYER_CONFIG: write_per_layer(parsed, sizes)}
    written = []
    for index, block in enumerate(parsed):
        with at_block(index):
            written.append(write_block(block, LAYOUTS[dialect], sizes))
    fields = {BLOCK_CONFIGS: written}
    return {MEGATRON_JSON: json.dumps(fields)} if dialect is Dialect.MEGATRON else fields


def _refuse_nested(config: Mapping[str, Any]) -> None:
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and fields_present(nested):
        raise BlockConfigError(
            "text_config says how its blocks differ, and block configs of nested (vision-language) models "
            "are not supported; pass config['text_config'] to work on the text model alone"
        )


def _read_field(field: str, value: Any, dialect: Dialect, base: BaseSizes) -> list[BlockConfig]:
    if field == PER_LAYER_CONFIG:
        if not isinstance(value, Mapping):
            raise BlockConfigError(f"{field} must be a mapping of layers, found {type(value).__name__}")
        return _parse(value, base, Dialect.PER_LAYER)
    blocks = _decoded(value) if field == MEGATRON_JSON else value
    if not isinstance(blocks, list | tuple):
        found = type(blocks).__name__
        raise BlockConfigError(f"{BLOCK_CONFIGS} must be a list with one entry a layer, found {found}")
    if field == MEGATRON_JSON:
        # megatron-core reads the Nemotron-NAS notation in its own field, too.
        dialect = dialect_of(blocks) or Dialect.MEGATRON
    return _parse(blocks, base, dialect)


def _decoded(text: Any) -> Any:
    try:
        return json.loads(text)[BLOCK_CONFIGS]
    except (TypeError, ValueError, KeyError) as error:
        raise BlockConfigError(
            f'{MEGATRON_JSON} is not JSON like {{"{BLOCK_CONFIGS}": [...]}}: {error!r}'
        ) from None


def _parse(
    blocks: Sequence[_Entry] | Mapping[Any, Any], base: BaseSizes, dialect: Dialect | None
) -> list[BlockConfig]:
    if isinstance(blocks, Mapping):
        parsed = read_per_layer(blocks, base)
    else:
        _check_number(len(blocks), base)
        parsed = []
        for index, entry in enumerate(blocks):
            with at_block(index):
                parsed.append(_parse_entry(entry, base, dialect))
    for index, block in enumerate(parsed):
        with at_block(index):
            _check_buildable(block, base)
    return parsed


def _parse_entry(entry: _Entry, base: BaseSizes, dialect: Dialect | None) -> BlockConfig:
    if isinstance(entry, BlockConfig):
        return entry
    if not isinstance(entry, Mapping):
        raise BlockConfigError(f"expected a BlockConfig or a mapping, found {entry!r}")
    if "subblock_configs" in entry:
        raise BlockConfigError(
            "subblock_configs is the typed list of later Puzzletron versions, which is not read; give "
            "per_layer_config, which those versions write beside it"
        )
    told = dialect or dialect_of([entry])
    if told is None:
        # Without a telling field, the dialects that list blocks read alike; flat fields can only be
        # per-layer.
        told = Dialect.ANYMODEL if not entry or {"attention", "ffn"} & set(entry) else Dialect.PER_LAYER
    return read_entry(entry, base) if told is Dialect.PER_LAYER else read_block(entry, LAYOUTS[told], base)


def _check_number(number: int, base: BaseSizes) -> None:
    layers = base.num_hidden_layers
    if number != layers:
        raise BlockConfigError(
            f"too {'few' if number < layers else 'many'} block configs: {number} for "
            f"{base.names.num_hidden_layers}={layers}; give one for each layer, with no_op for a part that "
            "is gone"
        )


def _check_buildable(block: BlockConfig, base: BaseSizes) -> None:
    """Raise if a block cannot be built beside this base config."""
    _check_attention(block.attention, base)
    if block.ffn.moe is not None:
        _check_visited(block.ffn.moe, base)
    said = dict(block.ffn.extra)
    if said.get("hidden_act") not in (None, base.hidden_act):
        raise BlockConfigError(
            f"ffn.hidden_act={said['hidden_act']!r} differs from {base.names.hidden_act}={base.hidden_act!r} "
            "of the base config; an activation of its own for one block is not built"
        )
    if said.get("gated") is False:
        raise BlockConfigError(
            "ffn.gated=False asks for an FFN without a gate in one block, which is not built"
        )


def _check_attention(attention: AttentionConfig, base: BaseSizes) -> None:
    if attention.mamba is not None:
        raise BlockConfigError(
            f"attention.mamba={attention.mamba!r} asks for a state-space mixer, which is not built"
        )
    if attention.num_attention_heads is None:
        name = base.names.num_attention_heads
        check_groups(base.num_attention_heads, attention.num_key_value_heads, heads_name=name)
    elif attention.num_key_value_heads is None:
        hint = (
            f" ({base.names.num_key_value_heads} of the base config): say num_key_value_heads of this block"
        )
        check_groups(attention.num_attention_heads, base.num_key_value_heads, hint=hint)


def _check_visited(moe: MoEConfig, base: BaseSizes) -> None:
    experts, visited = moe.num_local_experts, base.moe.num_experts_per_tok if base.moe is not None else None
    if moe.num_experts_per_tok is None and experts is not None and visited is not None and visited > experts:
        raise BlockConfigError(
            f"ffn.moe.num_local_experts={experts} is less than {base.names.num_experts_per_tok}={visited} of "
            "the base config; a token cannot visit more experts than there are: set num_experts_per_tok of "
            "this block"
        )


def _refuse_disagreement(
    blocks: list[BlockConfig], others: list[BlockConfig], first: str, second: str, base: BaseSizes
) -> None:
    for index, (block, other) in enumerate(zip(blocks, others, strict=True)):
        # In the sparse form, "as the base config says" and the same value said out loud are one.
        if block != other and write_entry(block, base) != write_entry(other, base):
            raise BlockConfigError(
                f"block {index}: {first} says {block!r}, but {second} says {other!r}; remove the field that "
                "is wrong"
            )
