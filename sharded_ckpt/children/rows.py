"""The parent's tensors, read in part: whole rows, mapped where their file is here, else fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sharded_ckpt.checkpoint.copying import copy_tensors
from sharded_ckpt.checkpoint.entry import TensorEntry
from sharded_ckpt.checkpoint.ranges import GAP_BYTES
from sharded_ckpt.checkpoint.reader import CheckpointReader
from sharded_ckpt.checkpoint.tensors import view_tensors
from sharded_ckpt.children.memory import MappedStorage, allocate

WINDOW_BYTES = 2 * 2**20
"""How much of a tensor is looked at at once; in fp64 it is up to four times that."""

_MAPPED_BYTES = 8 * 2**20
"""Mappings of this size and less may stay as long as they are needed."""


class RowReader:
    """Reads tensors of a parent, or some rows of them. What was read goes when the tensor goes.

    Args:
        reader: The parent.
        storage: What large tensors will be written through.
    """

    def __init__(self, reader: CheckpointReader, storage: MappedStorage) -> None:
        self._reader, self._storage = reader, storage
        self.location = reader.source.location

    def entry(self, key: str) -> TensorEntry:
        """Return dtype, shape and place of a tensor."""
        return self._reader.headers([key])[key]

    def whole(self, key: str) -> torch.Tensor:
        """Return a tensor."""
        return self._read(key, self.entry(key))

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        """Return the rows of a tensor from `first` to `last` (exclusive); no others are read."""
        entry = self.entry(key)
        row = entry.nbytes // entry.shape[0]
        begin, shape = entry.begin + first * row, (last - first, *entry.shape[1:])
        return self._read(key, TensorEntry(entry.dtype, shape, begin, begin + (last - first) * row))

    def windows(self, key: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield a tensor in runs of rows of about `WINDOW_BYTES`, each with the number of its first row."""
        entry = self.entry(key)
        step = max(1, WINDOW_BYTES * entry.shape[0] // max(entry.nbytes, 1))
        for first in range(0, entry.shape[0], step):
            yield first, self.rows(key, first, min(first + step, entry.shape[0]))

    def fp32(self, key: str) -> torch.Tensor:
        """Return a tensor in fp32."""
        entry = self.entry(key)
        if entry.dtype == "F32":
            return self.whole(key)
        tensor = allocate(entry.shape, torch.float32)
        for first, window in self.windows(key):
            tensor[first : first + len(window)] = window
        return tensor

    def _read(self, key: str, part: TensorEntry) -> torch.Tensor:
        ((shard, _),) = self._reader.plan([key])
        if part.begin == part.end or not shard.attach():
            return copy_tensors([(shard, [(key, part)])])[key]
        mapping, offset = shard.map(part.begin, part.end)
        if part.nbytes > _MAPPED_BYTES:
            self._storage.adopt(mapping)
        return view_tensors(mapping, [(key, part)], shard.file, base=part.begin - offset)[key]


def ascending_runs(rows: Sequence[int], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut a list of rows into runs that ascend and lie close together, so that each can be read at once.

    Args:
        rows: Numbers of rows, in any order.
        row_bytes: Bytes of one row.

    Returns:
        Begin and end (exclusive) of each run, as places in the list.

    Example:
        >>> list(ascending_runs([4, 5, 7, 0, 1], row_bytes=100))
        [(0, 3), (3, 5)]
    """
    start = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or not _goes_on(rows, start, place, row_bytes):
            yield start, place
            start = place


def _goes_on(rows: Sequence[int], start: int, place: int, row_bytes: int) -> bool:
    gap = (rows[place] - rows[place - 1] - 1) * row_bytes
    span = (rows[place] + 1 - rows[start]) * row_bytes
    return 0 <= gap <= GAP_BYTES and span <= WINDOW_BYTES
