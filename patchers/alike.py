"""Models whose blocks are all alike: the parts of one stand for those of all, until somebody owns them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from patchers.activation import patched_init, unpatched
from patchers.meta import ONE_AT_A_TIME, without_storage

_MEMBERS = ("_parameters", "_buffers", "_modules")


class AlikeBlocks:
    """Builds the parts of one block of a model, and blocks of their own only when they are asked for.

    Until then all have the same parts, hence their names and shapes, at a twentieth of the time; but none of
    the attributes that their class would set, so that nobody can take those of another block.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from patchers.meta import build_on_meta
        >>> blocks = AlikeBlocks()
        >>> with blocks.unbuilt(LlamaForCausalLM):
        ...     model = build_on_meta(LlamaForCausalLM, LlamaConfig(num_hidden_layers=3), None)
        >>> model.model.layers[2].self_attn is model.model.layers[0].self_attn
        True
        >>> blocks.build(model.model.layers[2])
        >>> model.model.layers[2].self_attn.layer_idx
        2
    """

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, Any]] | None = None
        self._builds: dict[nn.Module, Callable[[], None]] = {}

    @contextmanager
    def unbuilt(self, model_class: type[PreTrainedModel]) -> Iterator[None]:
        """Leave the blocks unbuilt in a model of a class that is built inside."""
        module = sys.modules[model_class.__module__]
        names = [name for name in model_class._no_split_modules or () if hasattr(module, name)]
        with unpatched(), patched_init(tuple(getattr(module, name) for name in names), self._share):
            yield

    def build(self, block: nn.Module) -> None:
        """Build a block in place, on meta and in eval mode, if it is not yet built."""
        with ONE_AT_A_TIME, unpatched(), without_storage():
            self._builds.pop(block, _nothing)()

    def _share(self, block: nn.Module, init: Callable[..., None], args: Any, kwargs: Any) -> None:
        build = functools.partial(init, block, *args, **kwargs)
        self._builds[block] = functools.partial(_build_in, torch.get_default_dtype(), block, build)
        if self._parts is None:
            build()
            self._parts = {members: vars(block)[members] for members in _MEMBERS}
            vars(block).clear()
        nn.Module.__init__(block)
        for members in _MEMBERS:
            vars(block)[members].update(self._parts[members])


def _build_in(dtype: torch.dtype, block: nn.Module, build: Callable[[], None]) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        build()
    finally:
        torch.set_default_dtype(before)
    block.eval()


def _nothing() -> None:
    """Nothing is to be built."""
