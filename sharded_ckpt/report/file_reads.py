"""Which bytes of each file the ranks of a plan read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from patchers.names import split_block
from sharded_ckpt.checkpoint.entry import TensorEntry
from sharded_ckpt.checkpoint.ranges import Range, coalesce
from sharded_ckpt.checkpoint.reader import open_checkpoint
from sharded_ckpt.ownership.plan import OwnershipPlan
from sharded_ckpt.report.overview import overview
from sharded_ckpt.report.rank_reads import ends_of
from sharded_ckpt.report.tensor_groups import group_tensors


@dataclass(frozen=True)
class FileReads:
    """What the ranks read of one file.

    Attributes:
        name: Of the file, relative to the checkpoint.
        nbytes: Of the whole file.
        ranges: For each rank the bytes that it reads, from the first to the one after the last, joined.
    """

    name: str
    nbytes: int
    ranges: tuple[tuple[Range, ...], ...]


def file_reads(checkpoint: str | os.PathLike[str], plan: OwnershipPlan) -> list[FileReads]:
    """Say which bytes each rank reads, from headers alone.

    Args:
        checkpoint: A directory, a file in it, a hub id, or a URL.
        plan: Who owns what.

    Raises:
        CheckpointNotFoundError: There are no weights at that place.
        CheckpointError: The files are broken.

    Example:
        >>> from sharded_ckpt import plan_ownership
        >>> files = file_reads(checkpoint, plan_ownership(checkpoint, 2))  # the path of a checkpoint
        >>> [len(ranges) for ranges in files[0].ranges]  # how many runs of bytes each rank reads of the first
        [1, 0]
    """
    stack = overview(checkpoint).stack
    reader = open_checkpoint(checkpoint, lambda index: index)
    files = reader.plan()
    reader.close()
    readers = _readers([item for _, items in files for item in items], stack, plan)
    found = []
    for shard, items in files:
        ranges: list[list[Range]] = [[] for _ in range(plan.world_size)]
        for key, entry in items:
            for rank in readers(key):
                ranges[rank].append((entry.begin, entry.end))
        joined = tuple(tuple(coalesce(part, gap=0)) for part in ranges)
        found.append(FileReads(shard.name, shard.header.file_size, joined))
    return found


def _readers(
    items: Iterable[tuple[str, TensorEntry]], stack: str | None, plan: OwnershipPlan
) -> Callable[[str], Iterable[int]]:
    """Return what tells, of the name of a tensor, the ranks that read it."""
    owners = {block: rank for rank, owned in enumerate(plan.blocks) for block in owned}

    def block(key: str) -> int | None:
        place = split_block(key)
        return place[1] if place and place[0] == stack else None

    outside = [group for item in items if block(item[0]) is None for group in group_tensors([("", [item])])]
    ends: dict[str, set[int]] = {}
    for groups, end in zip(ends_of(outside), (0, plan.num_blocks - 1), strict=True):
        for group in groups:
            ends.setdefault(group.name, set()).add(owners[end])

    def readers(key: str) -> Iterable[int]:
        index = block(key)
        return ends[key] if index is None else [owners[index]] if index in owners else []

    return readers
