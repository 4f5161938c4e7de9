"""Tensors of a checkpoint that are read when a loader asks for them, as safetensors' own slices are.

Each gets a mapping of its own, which goes when the loader drops it: where many tensors of a file become one
of the model (fused experts), no more than those of the one in the making take memory beside it.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from sharded_ckpt.checkpoint.entry import TensorEntry
from sharded_ckpt.checkpoint.reader import CheckpointReader

MOST = 30_000
"""A process has room for about twice as many mappings."""


class OnDemand:
    """One tensor of a checkpoint, not read yet.

    Args:
        reader: Of the checkpoint.
        key: The tensor.
        entry: What its file's header says of it.
        lock: Held while the reader is used; loaders have several threads.
    """

    def __init__(self, reader: CheckpointReader, key: str, entry: TensorEntry, lock: threading.Lock) -> None:
        self._reader, self._key, self._entry, self._lock = reader, key, entry, lock

    def __getitem__(self, index: Any) -> torch.Tensor:
        with self._lock:
            (_, tensor), *_ = self._reader.iter_tensors([self._key])
        return tensor[index]

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """Return the dtype, in safetensors' words."""
        return self._entry.dtype
