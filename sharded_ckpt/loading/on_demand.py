"""Tensors of a checkpoint that are read when a loader asks for them, as safetensors' own slices are.

What the loader has no use for is never read. Each gets a mapping of its own, which goes when the loader
drops it: where many tensors of a file become one of the model (fused experts), no more than those of the one
in the making take memory beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sharded_ckpt.checkpoint.reader import CheckpointReader
from sharded_ckpt.loading.pickled import PickledReader
from sharded_ckpt.loading.quantised import Coding

MOST_MAPPED = 30_000
"""A process has room for about twice as many mappings."""


class OnDemand:
    """One tensor, not read yet.

    Args:
        read: Reads it.
    """

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._read()[index]


class TensorsOnDemand:
    """Reads the tensors of a checkpoint one by one; loaders have several threads.

    Args:
        reader: Of the checkpoint.
        parts: The keys that each logical tensor is stored under.
        coding: How those with several keys are put together.
        copies: Whether what is read is to be in memory of its own, not in a mapping.
        progress: Told each number of bytes read.
    """

    def __init__(
        self,
        reader: CheckpointReader | PickledReader,
        parts: Mapping[str, Sequence[str]],
        coding: Coding | None = None,
        copies: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        self._reader, self._parts, self._coding = reader, parts, coding
        self._copies, self._progress = copies, progress
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> OnDemand:
        return OnDemand(lambda: self._read(name))

    def _read(self, name: str) -> torch.Tensor:
        tensors = [self._read_key(key) for key in self._parts[name]]
        if self._coding is not None and len(tensors) > 1:
            return self._coding.decode(name, tensors)
        return tensors[0].clone() if self._copies else tensors[0]

    def _read_key(self, key: str) -> torch.Tensor:
        with self._lock:
            (_, tensor), *_ = self._reader.iter_tensors([key])
            if self._progress is not None:
                self._progress(tensor.nbytes)
        return tensor
