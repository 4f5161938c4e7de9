"""The config.json of a save: what the model's config says, in the dialect that it came in."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedConfig

from patchers.base_sizes import BaseSizes, resolve_block
from patchers.block_config import BlockConfig
from patchers.deci_x import BlockConfigs
from patchers.dialects import (
    CONFIG_FIELDS,
    Dialect,
    decoder_fields,
    parse_blocks,
    read_block_configs,
    write_block_configs,
)
from patchers.errors import BlockConfigError
from patchers.families import NATIVE_FAMILY, PLAIN_FAMILIES
from patchers.inference import contradictions, infer_block_configs
from patchers.names import fold_indices
from sharded_ckpt.saving.carried_files import READABLE_AS_DECILM, config_saying

logger = logging.getLogger(__name__)

_SAID_BY_BLOCKS: Final = frozenset({*CONFIG_FIELDS, "intermediate_size", "num_key_value_heads"})
_SAID_OTHERWISE: Final = frozenset({"architectures", "auto_map", "dtype", "transformers_version"})
_DTYPE_FIELDS: Final = ("dtype", "torch_dtype")
_SHOWN: Final = 4
_ABSENT: Final = object()


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a config.json is to say that the model's config may not say, or say otherwise.

    Attributes:
        architecture: The name of the model's class.
        dtype: As `"bfloat16"`.
        untied: Whether embedding and head have diverged.
        blocks: In place of the config's own.
        dialect: In which to say the blocks; None for the one that they came in.
    """

    architecture: str | None = None
    dtype: str | None = None
    untied: bool = False
    blocks: Sequence[BlockConfig] | None = None
    dialect: Dialect | None = None


@dataclass(frozen=True)
class Origin:
    """The `nemotron-nas` config.json that a model was loaded from, and what it is as a native config."""

    raw: Mapping[str, Any]
    config: PreTrainedConfig


def config_json(config: PreTrainedConfig, said: Said, origin: Origin | None = None) -> dict[str, Any]:
    """Return the content of config.json; the config stays as it is.

    Args:
        config: Of the model.
        said: What it does not know.
        origin: What its model was loaded from, where that was translated into a native config: then the
            content of that one is returned, with what has changed since.

    Raises:
        BlockConfigError: The dialect cannot say a block; the message names block and field.
    """
    native = _native_json(config, said)
    base = native
    if origin is not None and said.dialect in (None, *READABLE_AS_DECILM):
        base = _restored(origin, native, said)
    fields = decoder_fields(base)
    told = read_block_configs(fields)
    if said.dialect in (None, told and told[1]) and (said.blocks is None or _are_said(said.blocks, fields)):
        return base
    blocks = said.blocks or (told[0] if told else [BlockConfig()] * BaseSizes.of(fields).num_hidden_layers)
    return config_saying(base, blocks, said.dialect)


def blocks_asked(config: PreTrainedConfig, asked: BlockConfigs) -> list[BlockConfig]:
    """Return what a caller says of the blocks, one for each layer.

    Raises:
        BlockConfigError: The entries are wrong, or not as many as the layers.
    """
    return parse_blocks(asked, decoder_fields(config.to_dict()))


def check_blocks(raw: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Make sure that a config.json describes the blocks that the tensors are.

    Only families whose tensors are known by their names are looked at; others are built (`check_built`).

    Args:
        raw: The content of the config.json.
        tensors: The shapes of all tensors by name.

    Raises:
        BlockConfigError: They contradict each other; the message names the blocks.
    """
    if raw.get("model_type") not in {*PLAIN_FAMILIES, *NATIVE_FAMILY}:
        return
    wrong = contradictions(raw, infer_block_configs(tensors, raw))
    if wrong:
        shown = [
            f"block {index}: the config says {said!r}, its tensors {found!r}"
            for index, (said, found) in list(wrong.items())[:_SHOWN]
        ]
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise BlockConfigError(
            f"the config does not describe the model: {'; '.join(shown + more)}. Nothing was saved. Pass "
            'block_configs=… to say what the blocks are, or block_configs="infer" if the tensors are right'
        )


def changed_without_trace(raw: Mapping[str, Any]) -> list[int]:
    """Return the changed blocks of a checkpoint that plain transformers opens without an error.

    It raises where shapes differ. Where sub-blocks are only gone, or linear, it finds nothing wrong but
    missing keys: it builds these parts with random weights, and tells so in a log.

    Args:
        raw: The content of the config.json.

    Returns:
        The blocks; none if there are no such blocks, or if transformers raises.

    Example:
        >>> sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 64}
        >>> changed_without_trace({**sizes, "per_layer_config": {"1": {"skip": ["mlp"]}}})
        [1]
    """
    raw = decoder_fields(raw)
    told = None if raw.get("model_type") in NATIVE_FAMILY else read_block_configs(raw)
    if told is None:
        return []
    sizes = BaseSizes.of(raw)
    heads, width = sizes.num_key_value_heads or sizes.num_attention_heads, sizes.intermediate_size
    resized = any(
        block.attention.num_key_value_heads not in (None, heads)
        or block.attention.num_attention_heads not in (None, sizes.num_attention_heads)
        or block.ffn.intermediate_size not in (None, width)
        or block.ffn.moe is not None
        for block in told[0]
    )
    changed = [i for i, b in enumerate(told[0]) if not (b.attention.is_native and b.ffn.is_native)]
    return [] if resized else changed


def silent_warning(raw: Mapping[str, Any], directory: object) -> str | None:
    """Return what to tell of a checkpoint that plain transformers would open silently wrong, if it would."""
    blocks = changed_without_trace(raw)
    if not blocks:
        return None
    return (
        f"{directory}: blocks {fold_indices(blocks)} lack sub-blocks, and no shape differs from a plain "
        "model's. transformers' own from_pretrained opens this checkpoint without an error and gives those "
        "parts random weights: open it with load_and_shard_model, or inside deci_x_patcher"
    )


def _native_json(config: PreTrainedConfig, said: Said) -> dict[str, Any]:
    """Return what `save_pretrained` would write, from a copy of the config."""
    twin = copy.deepcopy(config)
    _turn_into_dicts(twin)
    vars(twin).pop("transformers_weights", None)
    if said.dtype is not None:
        twin.dtype = said.dtype
    if said.architecture is not None:
        twin.architectures = [said.architecture]
    raw: dict[str, Any] = json.loads(twin.to_json_string())
    return {**raw, "tie_word_embeddings": False} if said.untied else raw


def _turn_into_dicts(config: PreTrainedConfig) -> None:
    """Write `BlockConfig`s that somebody has set on a config the way configs say them."""
    for owner in {id(one): one for one in (config, config.get_text_config(decoder=True))}.values():
        blocks = vars(owner).get("block_configs")
        if isinstance(blocks, list | tuple) and any(isinstance(block, BlockConfig) for block in blocks):
            fields = decoder_fields(owner.to_dict())
            owner.block_configs = write_block_configs(blocks, Dialect.ANYMODEL, fields)["block_configs"]


def _restored(origin: Origin, native: dict[str, Any], said: Said) -> dict[str, Any]:
    """Return the origin's own config with what has changed since; the native one if it cannot say that."""
    then = _native_json(origin.config, Said(architecture=said.architecture, dtype=said.dtype))
    names = {*then, *native} - _SAID_BY_BLOCKS - _SAID_OTHERWISE
    changed = {name for name in names if then.get(name, _ABSENT) != native.get(name, _ABSENT)}
    unsayable = (changed - {*origin.raw, "tie_word_embeddings"}) | (changed - {*native})
    told = read_block_configs(native)
    if unsayable or told is None:
        logger.warning(
            "saved is a %s config, since the %s config that it came in cannot say %s as it is now",
            *(native["model_type"], origin.raw["model_type"], ", ".join(sorted(unsayable)) or "the blocks"),
        )
        return native
    raw = {**origin.raw, **{name: native[name] for name in changed}}
    if said.dtype is not None and said.dtype not in [raw.get(field) for field in _DTYPE_FIELDS]:
        raw[next((field for field in _DTYPE_FIELDS if field in raw), "torch_dtype")] = said.dtype
    return raw if native.get("block_configs") == then["block_configs"] else config_saying(raw, told[0])


def _are_said(blocks: Sequence[BlockConfig], raw: Mapping[str, Any]) -> bool:
    """Whether a config says these blocks already, be it by saying nothing of single ones."""
    told, sizes = read_block_configs(raw), BaseSizes.of(raw)
    current = told[0] if told else [BlockConfig()] * len(blocks)
    now, then = ([resolve_block(b, sizes, allow_open=True) for b in some] for some in (current, blocks))
    return now == then
