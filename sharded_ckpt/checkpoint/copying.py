"""Tensors read into memory of their own, by several threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from sharded_ckpt.checkpoint.shard import Plan, Progress, Shard
from sharded_ckpt.checkpoint.tensors import dtype_of, shape_of

THREADS = 8
CHUNK_BYTES = 4 * 2**20
_MAX_BUFFERS = 512
"""Below the least IOV_MAX in use, 1024."""


class _Read(NamedTuple):
    """Bytes of a file, from an offset on, for several buffers one after the other."""

    shard: Shard
    offset: int
    buffers: list[memoryview]


def copy_tensors(plan: Plan, progress: Progress | None = None) -> dict[str, torch.Tensor]:
    """Read tensors into memory of their own; no file is mapped or needed afterwards.

    Args:
        plan: Files with the tensors wanted of each, in file order.
        progress: Called from several threads.
    """
    tensors: dict[str, torch.Tensor] = {}
    reads: list[_Read] = []
    for shard, items in plan:
        shard.attach()
        buffers = []
        for key, entry in items:
            raw = torch.empty(entry.nbytes, dtype=torch.uint8)
            tensors[key] = raw.view(dtype_of(key, entry, shard.file)).view(shape_of(entry))
            buffers.append((entry.begin, raw.numpy().data))
        reads += _plan_reads(shard, buffers)
    _run(reads, progress)
    return tensors


def _plan_reads(shard: Shard, buffers: Iterable[tuple[int, memoryview]]) -> Iterator[_Read]:
    """Join neighbours and cut the rest, so that each read has about the size at which disks are fast."""
    batch: list[memoryview] = []
    start = size = 0
    for offset, buffer in buffers:
        while len(buffer):
            if batch and (offset != start + size or size >= CHUNK_BYTES or len(batch) >= _MAX_BUFFERS):
                yield _Read(shard, start, batch)
                batch = []
            if not batch:
                start, size = offset, 0
            part, buffer = buffer[: CHUNK_BYTES - size], buffer[CHUNK_BYTES - size :]
            batch.append(part)
            size += len(part)
            offset += len(part)
    if batch:
        yield _Read(shard, start, batch)


def _run(reads: Iterable[_Read], progress: Progress | None) -> None:
    def run(read: _Read) -> None:
        count = sum(map(len, read.buffers))
        read.shard.readinto(read.buffers, read.offset)
        if progress is not None:
            progress(count)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-read") as pool:
        try:
            for _ in pool.map(run, reads):
                pass
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
