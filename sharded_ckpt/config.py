"""The config of a checkpoint, for the native classes: read without anybody's remote code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from patchers.deci_x import blocks_of
from patchers.dialects import read_block_configs
from patchers.errors import CheckpointNotFoundError, ConfigError
from patchers.families import NATIVE_FAMILY
from sharded_ckpt.checkpoint.source import TensorSource, open_source, read_config

_NOT_THE_NATIVE_CLASS = ("model_type", "auto_map", "architectures", "transformers_version", "_name_or_path")
_PER_BLOCK = {"intermediate_size": "ffn", "num_key_value_heads": "attention"}


def load_model_config(
    checkpoint: str | os.PathLike[str] | TensorSource,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> PreTrainedConfig:
    """Read a checkpoint's config.json into transformers' native config class.

    A `nemotron-nas` (DeciLM) config becomes that of the native family its blocks are built of, with its
    `block_configs` kept as they were; its global sizes are the largest of any block. Any other config is
    exactly what `AutoConfig.from_pretrained` gives.

    Args:
        checkpoint: A directory, a hub id, a URL, or an open source.
        trust_remote_code: Whether code in the checkpoint may define the config's class.
        revision: Of a hub id.
        token: For the hub.
        cache_dir: Where downloads are kept.
        local_files_only: Never reach for the network.

    Raises:
        CheckpointNotFoundError: There is no config.json.
        ConfigError: It has no known `model_type`, or values that its family does not take.
        BlockConfigError: Its block configs are wrong.
    """
    source = checkpoint
    if isinstance(source, (str, os.PathLike)):
        source = open_source(
            source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
    if not source.exists("config.json"):
        raise CheckpointNotFoundError(
            f"{source.location} has no config.json; pass model_config=… if you have one"
        )
    config = native_config(read_config(source), source, trust_remote_code)
    blocks_of(config)  # a config that contradicts itself is better refused here than in the middle of a build
    return config


def native_config(
    raw: Mapping[str, Any], source: TensorSource, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Turn the content of a config.json into a native config. See `load_model_config`."""
    family = raw.get("model_type")
    if not isinstance(family, str):
        raise ConfigError(
            f"config.json of {source.location} has no model_type, so its model class is unknown"
        )
    if family in NATIVE_FAMILY:
        return _of_nemotron_nas(raw)
    trusted = trust_remote_code and "auto_map" in raw
    if family not in CONFIG_MAPPING and not trusted:
        raise ConfigError(
            f"config.json of {source.location} has model_type {family!r}, which transformers does not know; "
            "if its own code defines it and you trust that code, pass trust_remote_code=True"
        )
    folder = source.local_path("config.json").parent
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{source.location}/config.json: transformers makes no {family} config of it: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if not trusted:  # a class of remote code is looked up by this name
        config.name_or_path = source.location
    return config


def _of_nemotron_nas(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """Say a DeciLM config in the words of its native family."""
    found = read_block_configs(raw)
    if found is None:
        raise ConfigError(f"a {raw['model_type']} config has block_configs, this one has none")
    blocks, _ = found
    fields = {name: value for name, value in raw.items() if name not in _NOT_THE_NATIVE_CLASS}
    for field, part in _PER_BLOCK.items():
        sizes = [getattr(getattr(block, part), field) for block in blocks]
        fields[field] = max((size for size in sizes if size is not None), default=None) or fields.get(field)
    fields = {name: value for name, value in fields.items() if value is not None or name not in _PER_BLOCK}
    config = AutoConfig.for_model(NATIVE_FAMILY[raw["model_type"]], **fields)
    return config
