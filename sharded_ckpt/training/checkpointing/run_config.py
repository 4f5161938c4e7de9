"""The config of a run as it is told beside a checkpoint: for people and scripts, never to be loaded."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import torch

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.local import LocalSource
from sharded_ckpt.checkpoint.source import read_json
from sharded_ckpt.training.checkpointing.layout import RUN_CONFIG_FILE

if TYPE_CHECKING:
    from sharded_ckpt.training.checkpointing.train_state import GlobalState

_ADDRESS: Final = re.compile(r" at 0x[0-9a-f]+")
_DEEPEST: Final = 20


def run_config_of(state: GlobalState) -> dict[str, Any]:
    """Return the config of a run as plain JSON: `{"checkpoint": {…}, …}`.

    What is no plain data stands there as its text: a dtype, a path, a class.

    Example:
        >>> from sharded_ckpt.training import GlobalState
        >>> run_config_of(GlobalState({"checkpoint": {"save": "runs/a"}, "dtype": torch.bfloat16}))
        {'checkpoint': {'save': 'runs/a'}, 'dtype': 'torch.bfloat16'}
    """
    cfg = state.cfg
    told = _plain(cfg, 0)
    whole = hasattr(cfg, "checkpoint") or isinstance(cfg, Mapping)
    return told if whole and isinstance(told, dict) else {"checkpoint": told}


def read_run_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `run_config_of` told of the run that has saved a checkpoint.

    Raises:
        CheckpointError: There is no such file, or it is broken.
    """
    found = read_json(LocalSource(directory), RUN_CONFIG_FILE)
    if not isinstance(found, dict):
        raise CheckpointError(f"{directory}/{RUN_CONFIG_FILE}: expected an object")
    return found


def _plain(value: Any, depth: int) -> Any:
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if depth > _DEEPEST:
        return _text(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in value]
    if (fields := _fields_of(value)) is not None:
        return {name: _plain(item, depth + 1) for name, item in fields.items()}
    return _text(value)


def _fields_of(value: Any) -> Mapping[str, Any] | None:
    """Return what a config object has; None for what is no config."""
    if isinstance(value, type | torch.Tensor | torch.nn.Module | Enum):
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    to_dict = getattr(value, "to_dict", None)
    found = to_dict() if callable(to_dict) else getattr(value, "__dict__", None)
    if not isinstance(found, Mapping) or type(value).__module__ in ("torch", "builtins"):
        return None
    return {name: item for name, item in found.items() if not str(name).startswith("_")}


def _text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return _ADDRESS.sub("", str(value))[:500]
