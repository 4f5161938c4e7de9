"""Building a model without storage."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

ONE_AT_A_TIME = threading.RLock()
"""Held by whoever builds a model. transformers and torch make parameters in the default dtype of the whole
process, which a build sets: a load in another thread would get its own weights cast to it, without a word."""


def build_on_meta(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype | str | None,
    attn_implementation: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Build a model on the meta device, in eval mode; the config that is passed in is not changed.

    Args:
        model_class: The native class.
        config: Of the whole model.
        dtype: Of its parameters.
        attn_implementation: As in `from_pretrained`.
        **options: Others of transformers' `_from_config`.
    """
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with ONE_AT_A_TIME, without_storage():
        return model_class._from_config(copy.deepcopy(config), dtype=dtype, **options).eval()


@contextmanager
def without_storage() -> Iterator[None]:
    """Build modules on the meta device, quickly."""
    with torch.device("meta"), _NoInitialisation():
        yield


class NothingFound(TorchFunctionMode):
    """Lets `nonzero` find nothing on meta, where nothing is to be found: loops over experts end at once."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.nonzero, torch.Tensor.nonzero) and args[0].is_meta:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.long)
        return function(*args, **(kwargs or {}))


class _NoInitialisation(TorchFunctionMode):
    """Skips `torch.nn.init` and the fills behind it: on meta they only take time."""

    _FILLS = frozenset({torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.fill_, torch.Tensor.zero_})

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init" or function in self._FILLS:
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return function(*args, **(kwargs or {}))
