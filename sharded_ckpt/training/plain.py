"""Small Python values as plain JSON and back, exactly: what optimizers and schedulers keep besides tensors.

JSON has no tuples, no infinities, no dicts with numbers as keys; each of these becomes an object with one
name that begins with `$`. Anything else is refused by name: nothing is ever pickled.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import torch

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt.checkpoint.tensors import torch_dtype
from sharded_ckpt.checkpoint.writer import DTYPE_NAMES

MOST_ELEMENTS = 8192
"""Elements of a tensor that may stand in JSON (a random state has 5056); others belong into tensor files."""

_DICTS = (dict, OrderedDict, defaultdict)


def to_plain(value: Any, where: str = "value") -> Any:
    """Return a value as plain JSON data.

    Args:
        value: None, numbers, strings, bytes, lists, tuples, sets, dicts, small tensors and dtypes, nested.
        where: What it is, for errors.

    Raises:
        ConfigError: There is something else in it.

    Example:
        >>> to_plain({"betas": (0.9, 0.999), "best": float("inf")})
        {'betas': {'$tuple': [0.9, 0.999]}, 'best': {'$float': 'inf'}}
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if type(value) in _DICTS:
        return _plain_dict(value, where)
    if type(value) is Counter:
        return {"$counter": _pairs(value, where)}
    if type(value) in (list, tuple, set):
        items = [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if type(value) is list else {f"${type(value).__name__}": items}
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value, where)
    if type(value) is bytes:
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, torch.dtype) and str(value) in DTYPE_NAMES:
        return {"$dtype": DTYPE_NAMES[str(value)]}
    raise ConfigError(
        f"{where} is a {type(value).__name__}, which cannot be written as plain data; only numbers, strings, "
        "lists, tuples, sets, dicts and small tensors can. Nothing is pickled"
    )


def from_plain(value: Any) -> Any:
    """Return what `to_plain` was called on.

    Raises:
        CheckpointError: It did not give this.

    Example:
        >>> from_plain({"$tuple": [1, {"$float": "-inf"}]})
        (1, -inf)
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = next(iter(value), "")
    if len(value) != 1 or not kind.startswith("$"):
        return {key: from_plain(item) for key, item in value.items()}
    try:
        return _READERS[kind](value[kind])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{value!s:.80} stands for no value that is known here: {error}") from None


def _plain_dict(value: dict[Any, Any], where: str) -> Any:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: to_plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    return {"$dict": _pairs(value, where)}


def _pairs(value: dict[Any, Any], where: str) -> list[Any]:
    return [[to_plain(k, f"a key of {where}"), to_plain(v, f"{where}[{k!r}]")] for k, v in value.items()]


def _plain_tensor(value: torch.Tensor, where: str) -> Any:
    if value.is_meta or value.numel() > MOST_ELEMENTS or str(value.dtype) not in DTYPE_NAMES:
        raise ConfigError(
            f"{where} is a tensor of shape {tuple(value.shape)} and {value.dtype}; only small ones with "
            f"values can be written as plain data (up to {MOST_ELEMENTS} elements)"
        )
    numbers = [to_plain(number) for number in value.detach().cpu().double().flatten().tolist()]
    if not value.is_floating_point():
        numbers = value.detach().cpu().flatten().tolist()
    return {"$tensor": [DTYPE_NAMES[str(value.dtype)], list(value.shape), numbers]}


def _tensor(said: Any) -> torch.Tensor:
    dtype, shape, numbers = said
    return torch.tensor(from_plain(numbers), dtype=_dtype(dtype)).reshape(shape)


def _dtype(name: str) -> torch.dtype:
    if (dtype := torch_dtype(name)) is None:
        raise ValueError(f"no dtype is called {name}")
    return dtype


_READERS: dict[str, Any] = {
    "$float": float,
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$tuple": lambda items: tuple(from_plain(items)),
    "$set": lambda items: set(from_plain(items)),
    "$dict": lambda pairs: {from_plain(key): from_plain(item) for key, item in pairs},
    "$counter": lambda pairs: Counter({from_plain(key): item for key, item in pairs}),
    "$tensor": _tensor,
    "$dtype": _dtype,
}
