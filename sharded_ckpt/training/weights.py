"""Weights on their way from files into the model of one rank: compared first, then filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sharded_ckpt.checkpoint.layout import TensorSpec
from sharded_ckpt.checkpoint.reader import CheckpointReader
from sharded_ckpt.checkpoint.tensors import torch_dtype
from sharded_ckpt.training.audit import FillPlan, plan_fill, spec_of
from sharded_ckpt.training.model_state import ModelState, refuse_unequal
from sharded_ckpt.training.places import is_extra_state


class WeightSource(Protocol):
    """Where weights come from."""

    where: str

    def specs(self) -> dict[str, TensorSpec]:
        """Return dtype and shape of every tensor."""

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors; they may lie in a mapping of a file."""

    def iter_tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Give tensors one by one, to be copied from and dropped."""


class SafetensorsWeights:
    """Weights in safetensors files.

    Args:
        reader: Reads them.
        where: What to call them in errors; their location if not given.
    """

    def __init__(self, reader: CheckpointReader, where: str | None = None) -> None:
        self._reader, self.where = reader, where or reader.index.location

    def specs(self) -> dict[str, TensorSpec]:
        """Return dtype and shape of every tensor."""
        return {key: (entry.dtype, entry.shape) for key, entry in self._reader.headers().items()}

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors, mapped."""
        return self._reader.read(list(keys))

    def iter_tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Give tensors one by one, in file order."""
        return self._reader.iter_tensors(list(keys))


@dataclass(frozen=True)
class FileForm:
    """How the names and forms of files and of memory translate; both directions work on meta tensors.

    Attributes:
        to_files: From memory to files. Of what it names that is not there, nothing is read.
        to_memory: From files to memory.
    """

    to_files: Callable[[Mapping[str, Any]], dict[str, Any]]
    to_memory: Callable[[Mapping[str, Any]], dict[str, Any]]


class Weights:
    """The weights of one rank, from one source.

    Args:
        source: Where they come from.
        state: What they fill.
        form: How the source's names and forms translate; None if they are those of memory.

    Attributes:
        found: What the source has, in the names and forms of memory.
        plan: Which of it feeds what.
    """

    def __init__(self, source: WeightSource, state: ModelState, form: FileForm | None = None) -> None:
        self._source, self._state, self._form = source, state, form
        self._places = state.places()
        self.where = source.where
        self.found: dict[str, TensorSpec] = {}
        self.plan = FillPlan(())

    def compare(self) -> None:
        """Find out which key feeds what.

        Raises:
            CheckpointError: Something does not fit; nothing was touched.
        """
        self._stored = self._source.specs()
        self.found = self._stored
        if self._form is not None:
            memory = self._form.to_memory({key: _meta(spec) for key, spec in self._stored.items()})
            self.found = {name: spec_of(tensor) for name, tensor in memory.items()}
        self.plan = plan_fill(self._state.wanted(self._places), self.found, self.where)
        if self.plan.equal:
            refuse_unequal(self.plan, self._read([k for group in self.plan.equal for k in group]), self.where)

    def fill(self) -> int:
        """Fill the model; return how many tensors were filled."""
        keys = list(self.plan.consumers)
        items = self._source.iter_tensors(keys) if self._form is None else iter(self._read(keys).items())
        filled = self._state.fill(self.plan, self._places, items)
        if extra := [key for key in self.found if is_extra_state(key)]:
            self._state.set_extra_states({name: t.clone() for name, t in self._read(extra).items()})
        return filled

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """Read tensors by their names in memory."""
        if self._form is None:
            return self._source.read(names)
        wanted = self._form.to_files({name: _meta(self.found[name]) for name in names})
        stored = self._source.read(key for key in wanted if key in self._stored)
        memory = self._form.to_memory(stored)
        return {name: memory[name] for name in names}


def _meta(spec: TensorSpec) -> Tensor:
    return torch.empty(spec[1], dtype=torch_dtype(spec[0]), device="meta")
