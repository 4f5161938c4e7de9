"""What there is to share out: costs counted of configs, of checkpoints, and of the headers of their files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from patchers.block_config import BlockConfig
from patchers.dialects import read_block_configs
from patchers.errors import CheckpointNotFoundError, ConfigError, OwnershipError
from patchers.names import block_of
from sharded_ckpt.checkpoint.source import find_config, open_source
from sharded_ckpt.ownership.costs import LLAMA_SHAPED, ModelCosts, model_costs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Countable: TypeAlias = "Mapping[str, Any] | PreTrainedConfig | str | os.PathLike[str]"
"""A config, the content of a config.json, or a checkpoint (a directory or a hub id) that has one."""

DEQUANTISED = ("fp8", "mxfp4")
"""The `quant_method` of weights that are loaded as the numbers that they stand for."""

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def costs_of(model: Countable, *, by: str = "bytes", batch: int = 1, length: int = 4096) -> ModelCosts:
    """Count what the parts of a model cost, by its config alone.

    Families of the llama shape are counted by formula, which imports no torch; any other on the skeleton of
    its native class. Bytes are those in memory: of weights that a load dequantises, those of the config's
    dtype (what the files of a checkpoint hold, its headers tell: `plan_from_index`).

    Args:
        model: A config, or a checkpoint whose config is read.
        by: See `plan_ownership`.
        batch: Sequences of the forward pass or the cache.
        length: Tokens of a sequence.

    Raises:
        ConfigError: They cannot be counted.
    """
    raw = _raw_config(model)
    if by.startswith("bytes"):
        _refuse_unread_coding(raw)
    if raw.get("model_type", "llama") in LLAMA_SHAPED:
        found = read_block_configs(raw)
        blocks = found[0] if found else [BlockConfig()] * _number_of_blocks(raw)
        size = _dtype_bytes(raw) if by.startswith("bytes") else 2
        return model_costs(blocks, raw, by=by, dtype_bytes=size, batch=batch, length=length)
    from sharded_ckpt.ownership.skeleton import skeleton_costs

    return skeleton_costs(_native_config(model), by=by, batch=batch, length=length)


def index_costs(nbytes: Mapping[str, int], num_blocks: int, *, tied: bool | None = None) -> ModelCosts:
    """Count by the bytes of each tensor of a checkpoint, as its headers tell them.

    Args:
        nbytes: Bytes of each tensor, by key.
        num_blocks: Number of blocks; a block without tensors costs nothing.
        tied: Whether the last rank reads the embedding for its head. By default, if there is no head.

    Raises:
        OwnershipError: A key belongs to a block that the model does not have.

    Example:
        >>> sizes = {f"model.layers.{i}.mlp.weight": 100 for i in range(4)}
        >>> index_costs({"model.embed_tokens.weight": 300, **sizes}, 4)
        ModelCosts(blocks=(100, 100, 100, 100), embedding=300, head=300, by='bytes', everywhere=0)
    """
    costs, first, last, has_head = [0] * num_blocks, 0, 0, False
    for key, size in nbytes.items():
        block = block_of(key)
        if block is not None:
            if block >= num_blocks:
                raise OwnershipError(f"{key} is of block {block}, but the model has {num_blocks} blocks")
            costs[block] += size
        elif _is_embedding(key):
            first += size
        else:
            last += size
            has_head = has_head or not any(word in key for word in ("norm", "ln_f"))
    if tied if tied is not None else not has_head:
        last += first
    return ModelCosts(tuple(costs), first, last)


def _raw_config(model: Countable) -> Mapping[str, Any]:
    if isinstance(model, Mapping):
        return model
    if isinstance(model, (str, os.PathLike)):
        source = open_source(model)
        if (raw := find_config(source)) is None:
            raise CheckpointNotFoundError(f"{source.location}: there is no config.json to count by")
        return raw
    if not hasattr(model, "to_dict"):
        raise ConfigError(
            f"costs cannot be counted of a {type(model).__name__}; give a config, a checkpoint, or the cost "
            "of each block"
        )
    return model.to_dict()


def _native_config(model: Countable) -> PreTrainedConfig:
    if isinstance(model, Mapping):
        raise ConfigError(
            f"the formulas count blocks of the llama shape, not those of {model.get('model_type')!r}; pass "
            "the checkpoint, or its config as load_model_config returns it"
        )
    if not isinstance(model, (str, os.PathLike)):
        return model
    from sharded_ckpt.config import load_model_config

    return load_model_config(model)


def _number_of_blocks(raw: Mapping[str, Any]) -> int:
    if not isinstance(raw.get("num_hidden_layers"), int):
        raise ConfigError("the config does not say num_hidden_layers, which is needed")
    number: int = raw["num_hidden_layers"]
    return number


def _dtype_bytes(raw: Mapping[str, Any]) -> int:
    """Return the size of an element, as the config says it; transformers' default is fp32."""
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPE_BYTES:
        raise ConfigError(f"the config's dtype is {name!r}; known are {', '.join(_DTYPE_BYTES)}")
    return _DTYPE_BYTES[name]


def quantisation_of(raw: Mapping[str, Any]) -> str | None:
    """Return how a config says its weights are quantised: the `quant_method`; None if they are not."""
    configs = [part for part in (raw, raw.get("text_config")) if isinstance(part, Mapping)]
    said = next((part["quantization_config"] for part in configs if part.get("quantization_config")), None)
    if said is None:
        return None
    method = said.get("quant_method") if isinstance(said, Mapping) else getattr(said, "quant_method", None)
    return str(getattr(method, "value", method))


def _refuse_unread_coding(raw: Mapping[str, Any]) -> None:
    """Raise where nobody here knows what quantised weights would take in memory."""
    method = quantisation_of(raw)
    if method is not None and method not in DEQUANTISED:
        raise ConfigError(
            f"the weights are quantised by {method}, which is not read here ({' and '.join(DEQUANTISED)} "
            "are), so it is not known what they take in memory; plan_from_index counts what the tensors of "
            "a checkpoint take in its files"
        )


def _is_embedding(key: str) -> bool:
    """Guess from a name outside the blocks: GPT-NeoX calls its head "embed_out"."""
    return any(word in key for word in ("embed", "wte", "wpe")) and "embed_out" not in key
