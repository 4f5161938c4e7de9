"""What a forward pass is given: the same on every rank, cut into micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from transformers import Cache, GenerationConfig, PreTrainedConfig

from patchers.errors import ConfigError
from sharded_ckpt.checkpoint.raw import bytes_of

FINGERPRINTED = ("input_ids", "attention_mask", "position_ids", "other arguments")
"""What a fingerprint says, in this order."""

MicroBatches = int | Sequence[int] | Literal["auto"]
"""How many micro-batches, the rows of each, or "auto": those that are the fastest, by measuring."""

_OF_ALL_ROWS = ("logits_to_keep", "cache_position")  # numbers of tokens, as many as there may be rows
_OF_EACH_ROW = ("attention_mask", "labels", "shift_labels", "position_ids", "token_type_ids")
_OF_ALL_BLOCKS = ("output_hidden_states", "output_attentions", "output_router_logits")


def require_token_ids(input_ids: Any) -> None:
    """Refuse anything but whole numbers `(batch, tokens)`.

    Raises:
        ConfigError: It says what was given.
    """
    what = type(input_ids).__name__
    if isinstance(input_ids, torch.Tensor):
        what = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
        if input_ids.ndim == 2 and input_ids.numel() and input_ids.dtype in (torch.int64, torch.int32):
            return
    raise ConfigError(
        f"input_ids must be a tensor of token ids, (batch, tokens), not {what}; a tokenizer gives one with "
        'return_tensors="pt", padding=True'
    )


def require_runnable(inputs: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Refuse what no stage can give.

    Raises:
        ConfigError: It says what to do instead.
    """
    if inputs.get("inputs_embeds") is not None:
        raise ConfigError(
            "a pipeline runs on input_ids, from which every rank computes masks and positions itself; "
            "inputs_embeds cannot be given"
        )
    for name in _OF_ALL_BLOCKS:
        asked = inputs.get(name)
        if asked or (asked is None and getattr(config, name, False)):
            raise ConfigError(
                f"{name} would be that of one rank's blocks only; pass {name}=False, or run the whole model "
                "in one process"
            )


def fingerprint(inputs: Mapping[str, Any], *, extra: Any = None) -> torch.Tensor:
    """Return four numbers that are equal on two ranks if their inputs are.

    Args:
        inputs: Of a forward pass. Of a cache only its length counts.
        extra: Anything else that must be the same, as plain data.
    """
    *tensors, _ = FINGERPRINTED
    others = [(name, _number(inputs[name])) for name in sorted(inputs) if name not in tensors]
    return torch.tensor([*(_number(inputs.get(name)) for name in tensors), _number([*others, extra])])


def differing(one: torch.Tensor, other: torch.Tensor) -> list[str]:
    """Return what differs between two fingerprints, by name."""
    pairs = zip(FINGERPRINTED, one.tolist(), other.tolist(), strict=True)
    return [name for name, ours, theirs in pairs if ours != theirs]


def sizes_of(micro_batches: MicroBatches, batch: int) -> list[int]:
    """Return how many rows each micro-batch has.

    Args:
        micro_batches: How many, as even as can be and none of them empty; or the rows of each.
        batch: Rows altogether.

    Raises:
        ConfigError: They are not the rows of this batch; or a text, such as "auto", where none is taken.

    Example:
        >>> sizes_of(3, 8), sizes_of(3, 2), sizes_of([5, 3], 8)
        ([3, 3, 2], [1, 1], [5, 3])
    """
    if isinstance(micro_batches, str):
        raise ConfigError(f"micro_batches is {micro_batches!r}; say how many, or the rows of each")
    if isinstance(micro_batches, int):
        if micro_batches < 1 or batch < 1:
            raise ConfigError(f"a batch of {batch} rows cannot be cut into {micro_batches} micro-batches")
        count = min(micro_batches, batch)
        return [batch // count + (index < batch % count) for index in range(count)]
    sizes = list(micro_batches)
    if sum(sizes) != batch or min(sizes, default=0) < 1:
        raise ConfigError(f"micro_batches are {sizes}, which are not the {batch} rows of the batch")
    return sizes


def inseparable(inputs: Mapping[str, Any]) -> str | None:
    """Return the name of an input that cannot be put together again if it is cut: a cache, or a loss's."""
    caches = (name for name, value in inputs.items() if isinstance(value, Cache))
    return next(caches, None if inputs.get("labels") is None else "labels")


def require_separable(inputs: Mapping[str, Any], count: int) -> None:
    """Refuse to cut what cannot be put together again.

    Raises:
        ConfigError: There is a cache or a loss, and more than one micro-batch.
    """
    name = inseparable(inputs)
    if count > 1 and name is not None:
        raise ConfigError(
            f"{name} cannot be cut into micro-batches: pass micro_batches=1, or use generate (which keeps a "
            "cache for each), score or train_step"
        )


def joined(outputs: Sequence[Any]) -> Any:
    """Return the output of the whole batch, given those of its micro-batches; of several, the logits."""
    if len(outputs) == 1:
        return outputs[0]
    return type(outputs[0])(logits=torch.cat([output.logits for output in outputs]))


def cut(inputs: Mapping[str, Any], sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Cut inputs along the batch.

    Args:
        inputs: With `input_ids` `(batch, tokens)`. Tensors whose first dimension is the batch are cut,
            `position_ids` of three dimensions along their second one. Everything else is shared.
        sizes: How many rows each micro-batch has.

    Raises:
        ConfigError: A mask, labels and the like are those of another number of rows.
    """
    batch, at = inputs["input_ids"].shape[0], 0
    if len(sizes) > 1:
        _require_rows(inputs, batch)
    for size in sizes:
        yield {name: _rows(name, value, batch, at, size) for name, value in inputs.items()}
        at += size


def _require_rows(inputs: Mapping[str, Any], batch: int) -> None:
    """Refuse what a model refuses too, unless all micro-batches, of as many rows, were given the same."""
    for name, value in inputs.items():
        if name not in _OF_EACH_ROW or not isinstance(value, torch.Tensor) or value.ndim < 2:
            continue
        rows = value.shape[_batch_dimension(name, value)]
        may_be_one = name in ("position_ids", "token_type_ids") or value.ndim == 4
        if rows != batch and not (rows == 1 and may_be_one):
            raise ConfigError(
                f"{name} {tuple(value.shape)} has {rows} rows, but input_ids have {batch}; give it a row for "
                "each of them"
            )


def _rows(name: str, value: Any, batch: int, at: int, size: int) -> Any:
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or name in _OF_ALL_ROWS:
        return value
    dimension = _batch_dimension(name, value)
    return value.narrow(dimension, at, size) if value.shape[dimension] == batch else value


def _batch_dimension(name: str, value: torch.Tensor) -> int:
    return 1 if name == "position_ids" and value.ndim == 3 else 0


def _number(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(_told(value), digest_size=7).digest(), "big")


def _told(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        return repr((plain.dtype, tuple(plain.shape))).encode() + bytes_of(plain).numpy().tobytes()
    if isinstance(value, Cache):
        return repr(("cache", _length(value))).encode()
    if isinstance(value, GenerationConfig):
        return value.to_json_string().encode()
    if isinstance(value, Mapping):
        return repr([(name, _number(value[name])) for name in sorted(value)]).encode()
    if isinstance(value, (tuple, list)):
        return repr([_number(each) for each in value]).encode()
    plain_data = isinstance(value, (bool, int, float, str, type(None)))
    return (repr(value) if plain_data else type(value).__qualname__).encode()


def _length(cache: Cache) -> int | None:
    with suppress(ValueError):  # that of a family without attention
        return int(cache.get_seq_length())
    return None
