"""What each rank of a plan reads of a checkpoint, and what has to be downloaded for that."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from sharded_ckpt.checkpoint.source import TensorSource, open_source
from sharded_ckpt.ownership.costs import ModelCosts
from sharded_ckpt.ownership.counting import index_costs
from sharded_ckpt.ownership.plan import OwnershipPlan
from sharded_ckpt.report.overview import overview
from sharded_ckpt.report.tensor_groups import TensorGroup


@dataclass(frozen=True)
class RankReads:
    """What one rank reads.

    Attributes:
        nbytes: Bytes of the tensors of its blocks, and of the ends where it has them.
        files: The files that hold them.
        download: Bytes of those files that are not on this machine yet; whole files are downloaded.
    """

    nbytes: int
    files: tuple[str, ...]
    download: int


def rank_reads(checkpoint: str | os.PathLike[str], plan: OwnershipPlan) -> list[RankReads]:
    """Say what each rank reads, from headers alone.

    What stands beside the language model (a vision tower) is counted for the rank with the embedding. Which
    tensors outside of blocks are of which end is told by their names.

    Args:
        checkpoint: A directory, a file in it, a hub id, or a URL.
        plan: Who owns what.

    Raises:
        CheckpointNotFoundError: There are no weights at that place.
        CheckpointError: The files are broken.
    """
    found, source = overview(checkpoint), open_source(checkpoint)
    blocks = {row.index: row for row in found.blocks if row.stack == found.stack}
    first, last = ends_of([group for group in found.groups if group.stack != found.stack])
    reads = []
    for owned in plan.blocks:
        rows = [blocks[index] for index in owned if index in blocks]
        ends = (first if 0 in owned else []) + (last if plan.num_blocks - 1 in owned else [])
        groups = {id(group): group for group in ends}.values()  # a tied embedding is read once
        nbytes = sum(row.nbytes for row in rows) + sum(group.nbytes for group in groups)
        files = {file for row in rows for file in row.files} | {file for g in groups for file in g.numbers}
        reads.append(RankReads(nbytes, tuple(sorted(files)), _missing_bytes(source, files)))
    return reads


def stored_costs(checkpoint: str | os.PathLike[str]) -> ModelCosts:
    """Count the bytes of a checkpoint's parts as they are stored, quantised ones too, from headers alone.

    Raises:
        CheckpointError: The files are broken.
    """
    found = overview(checkpoint)
    blocks = {row.index: row.nbytes for row in found.blocks if row.stack == found.stack}
    first, last = ends_of([group for group in found.groups if group.stack != found.stack])
    nbytes = tuple(blocks.get(index, 0) for index in range(max(blocks, default=-1) + 1))
    return ModelCosts(nbytes, sum(group.nbytes for group in first), sum(group.nbytes for group in last))


def ends_of(groups: Iterable[TensorGroup]) -> tuple[list[TensorGroup], list[TensorGroup]]:
    """Return what the ranks with the first and the last block read besides; a tied embedding is in both.

    Args:
        groups: The tensors outside of the language model's blocks.
    """
    first, last, embedding = list[TensorGroup](), list[TensorGroup](), list[TensorGroup]()
    for group in groups:
        if group.stack is not None:
            first.append(group)
        else:
            is_first = index_costs({group.name: group.nbytes}, 0, tied=False).embedding
            (embedding if is_first else last).append(group)
    is_tied = index_costs({group.name: group.nbytes for group in embedding + last}, 0).head > sum(
        group.nbytes for group in last
    )
    return first + embedding, last + (embedding if is_tied else [])


def _missing_bytes(source: TensorSource, files: Iterable[str]) -> int:
    return sum(source.size(file) for file in files if not source.is_here(file))
