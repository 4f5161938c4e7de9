"""What the parts of any family's model take, counted on its skeleton: the native class on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from patchers.cache_names import cache_of
from patchers.deci_x import BlockConfigs
from patchers.descriptor import ModelDescriptor
from patchers.embedding_use import reads_embedding_everywhere
from patchers.errors import ConfigError
from sharded_ckpt.model import build_skeleton, outer_modules
from sharded_ckpt.ownership.costs import ModelCosts

SKELETON_MEASURES = ("bytes", "parameters", "count", "bytes+kv")
"""What can be counted without weights and without formulas."""


def skeleton_costs(
    config: PreTrainedConfig,
    *,
    by: str = "bytes",
    batch: int = 1,
    length: int = 4096,
    dtype: torch.dtype | None = None,
    descriptor: ModelDescriptor | str = "auto",
    block_configs: BlockConfigs | None = None,
) -> ModelCosts:
    """Return what each part of a model takes: exact for every family, with nothing allocated.

    The cache is that of a forward pass on the meta device, so that latent attention, sliding windows and the
    states of state-space mixers count as what they are.

    Args:
        config: The config of the whole model.
        by: "bytes" or "parameters" of the weights; "count" of blocks; "bytes+kv" of the weights and the cache
            of `batch` sequences of `length` tokens.
        batch: Sequences.
        length: Tokens of a sequence.
        dtype: Of the weights and the cache; by default the config's.
        descriptor: A `ModelDescriptor`, the name of a family, or `"auto"`.
        block_configs: One entry a block, in place of what the config says.

    Raises:
        ConfigError: The measure is none of these, or the family's forward does not run on meta.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, vocab_size=10,
        ...                      num_attention_heads=2, num_key_value_heads=1, dtype="bfloat16")
        >>> skeleton_costs(config, by="bytes+kv", length=100)
        ModelCosts(blocks=(2784,), embedding=160, head=176, by='bytes+kv', everywhere=...)
    """
    if by not in SKELETON_MEASURES:
        raise ConfigError(
            f"costs cannot be counted by {by!r} on the skeleton of a {config.model_type} model; choose "
            f"one of {', '.join(SKELETON_MEASURES)}, or measure_block_times(config)"
        )
    descriptor = ModelDescriptor.of(descriptor, config)
    dtype = dtype or getattr(config, "dtype", None) or torch.get_default_dtype()
    model = build_skeleton(descriptor, config, dtype, block_configs)
    if by == "count":
        return ModelCosts((1,) * len(list(model.get_submodule(descriptor.layers).children())), by=by)
    if by == "parameters":
        return _weights(model, descriptor, _parameters, by)
    weights = model_bytes(model, descriptor)
    if by == "bytes":
        return weights
    # grouped experts run in no other dtype on meta
    twin = build_skeleton(descriptor, config, torch.bfloat16, block_configs)
    itemsize = torch.empty((), dtype=dtype).element_size()
    cached = _cache_bytes(twin, (batch, length), len(weights.blocks), itemsize)
    blocks = tuple(weight + kv for weight, kv in zip(weights.blocks, cached, strict=True))
    return replace(weights, blocks=blocks, by=by)


def model_bytes(model: PreTrainedModel, descriptor: ModelDescriptor) -> ModelCosts:
    """Measure a whole model (on meta, say) by its parameters and buffers. A tied head counts twice."""
    return _weights(model, descriptor, nbytes_of, "bytes")


def _weights(
    model: PreTrainedModel, descriptor: ModelDescriptor, size: Callable[[nn.Module], int], by: str
) -> ModelCosts:
    ends = [name for name in (descriptor.final_norm, descriptor.head) if name is not None]
    first = outer_modules(model, descriptor)
    if not reads_embedding_everywhere(model, descriptor):
        first = [descriptor.embedding, *first]
    head = sum(size(model.get_submodule(name)) for name in ends)
    blocks = tuple(size(block) for block in model.get_submodule(descriptor.layers).children())
    embedding = sum(size(model.get_submodule(name)) for name in first)
    others = modules_beside(model, {descriptor.layers, *first, *ends})
    everywhere = sum(size(model.get_submodule(name)) for name in others)
    return ModelCosts(blocks, embedding, head, by, everywhere=everywhere)


def modules_beside(model: nn.Module, parts: Collection[str], prefix: str = "") -> Iterator[str]:
    """Yield the names of modules that are in no part: position embeddings, a norm of the embedding, say."""
    for name, module in model.named_children():
        path = f"{prefix}{name}"
        if any(part.startswith(f"{path}.") for part in parts):
            yield from modules_beside(module, parts, f"{path}.")
        elif path not in parts:
            yield path


def nbytes_of(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers of a module."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _cache_bytes(model: PreTrainedModel, shape: tuple[int, int], count: int, itemsize: int) -> list[int]:
    """Return what the cache of each block takes after a forward pass of a bf16 model.

    Args:
        model: The skeleton, in bf16.
        shape: Sequences, and tokens of each.
        count: Number of blocks.
        itemsize: Bytes of an element, where the model has bf16.
    """
    tokens = torch.zeros(shape, dtype=torch.int64, device="meta")
    model.config.pad_token_id = None  # gpt2 and others would look for it in the tokens
    try:
        with torch.no_grad():
            output: Any = model(tokens, use_cache=True)
    except Exception as error:  # whatever a family does that meta tensors cannot
        raise ConfigError(
            f"the cache of a {model.config.model_type} model cannot be counted without running it: "
            f"{type(error).__name__}: {error}; count by bytes, and leave room for the cache"
        ) from error
    cache = cache_of(output)
    held = vars(cache) if cache is not None else {}
    layers = held.get("layers", ())
    elsewhere = {name: value for name, value in held.items() if name != "layers"}
    if not held or len(layers) > count or _tensor_bytes(elsewhere, itemsize):
        raise ConfigError(
            f"the cache of a {model.config.model_type} model is a {type(cache).__name__} that does not keep "
            "one layer for each block; count by bytes, and leave room for the cache"
        )
    taken = [_tensor_bytes(vars(layer), itemsize) for layer in layers]
    return taken + [0] * (count - len(taken))


def _tensor_bytes(held: Any, itemsize: int) -> int:
    """Return the bytes of all tensors in what a cache holds; the states of mixers are in containers."""
    if isinstance(held, torch.Tensor):
        return held.numel() * (itemsize if held.dtype == torch.bfloat16 else held.element_size())
    values = held.values() if isinstance(held, Mapping) else held if isinstance(held, (list, tuple)) else ()
    return sum(_tensor_bytes(value, itemsize) for value in values)
