"""Which dialect a config speaks, told by its field names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from patchers.dialects.dialect import Dialect
from patchers.families import OWN_PER_LAYER_CONFIG

BLOCK_CONFIGS = "block_configs"
PER_LAYER_CONFIG = "per_layer_config"
MEGATRON_JSON = "heterogeneous_layers_config_encoded_json"

CONFIG_FIELDS = (BLOCK_CONFIGS, PER_LAYER_CONFIG, MEGATRON_JSON)
"""The config fields that hold block configs. Drop all of them before setting those of another dialect."""


def fields_present(config: Mapping[str, Any]) -> list[str]:
    """Return which of `CONFIG_FIELDS` a config says blocks in."""
    return [
        field for field in CONFIG_FIELDS if config.get(field) is not None and not _is_its_own(field, config)
    ]


def _is_its_own(field: str, config: Mapping[str, Any]) -> bool:
    """Whether a `per_layer_config` is the family's own matter: it builds what it says, but for `skip`."""
    if field != PER_LAYER_CONFIG or config.get("model_type") not in OWN_PER_LAYER_CONFIG:
        return False
    entries = config[field]
    return isinstance(entries, Mapping) and not any("skip" in (entry or ()) for entry in entries.values())


def detect_dialect(config: Mapping[str, Any]) -> Dialect | None:
    """Return the dialect in which a raw config says its blocks, or None if it says nothing of single blocks.

    The field names of all blocks together decide: a block without attention and FFN has no telling field.

    Example:
        >>> detect_dialect({"num_hidden_layers": 2, "per_layer_config": {"1": {"skip": ["mlp"]}}}).value
        'per-layer'
    """
    present = fields_present(config)
    if not present:
        return None
    if present[0] != BLOCK_CONFIGS:
        return Dialect.PER_LAYER if present[0] == PER_LAYER_CONFIG else Dialect.MEGATRON
    blocks = config[BLOCK_CONFIGS]
    told = dialect_of(blocks if isinstance(blocks, list | tuple) else [])
    untold = (
        Dialect.NEMOTRON_NAS if config.get("model_type") in ("nemotron-nas", "deci") else Dialect.ANYMODEL
    )
    return told or untold


def dialect_of(blocks: Iterable[Any]) -> Dialect | None:
    """Return the dialect that entries of a block list speak, or None if no field tells."""
    found: set[str] = set()
    for block in blocks:
        if isinstance(block, Mapping):
            parts = [
                block[part] for part in ("attention", "ffn", "mlp") if isinstance(block.get(part), Mapping)
            ]
            found |= ({"mlp"} & set(block)).union(*parts)
    if found & {"mlp", "num_query_groups", "ffn_hidden_size"}:
        return Dialect.MEGATRON
    if found & {"n_heads_in_group", "ffn_mult"}:
        return Dialect.TRANSITIONAL if "intermediate_size" in found else Dialect.NEMOTRON_NAS
    anymodel = {"num_key_value_heads", "num_attention_heads", "intermediate_size", "moe"}
    return Dialect.ANYMODEL if found & anymodel else None
