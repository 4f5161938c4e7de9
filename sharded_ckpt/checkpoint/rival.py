"""A single file beside an index: whether both are the same checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from patchers.names import fold
from sharded_ckpt.checkpoint.entry import TensorEntry
from sharded_ckpt.checkpoint.ranges import cut
from sharded_ckpt.checkpoint.source import TensorSource, read_source_header

if TYPE_CHECKING:
    from sharded_ckpt.checkpoint.index import CheckpointIndex

_CHUNK_BYTES = 8 * 2**20

Place = tuple[str, TensorEntry]


def find_difference(source: TensorSource, index: CheckpointIndex, single: str) -> str | None:
    """Say in what a single file differs from what an index stands for; None if in nothing.

    Names are compared first, then headers, and bytes only when all else agrees. Bytes that are not on this
    machine are not fetched for this: there the headers decide.
    """
    one = read_source_header(source, single).tensors
    if one.keys() != index.keys():
        return _describe_names(one.keys() - index.keys(), index.keys() - one.keys(), single)
    if missing := source.missing(index.files):
        return f"{missing[0]} is not there to be compared"
    many = _places(source, index)
    unlike = [key for key in one if key not in many or one[key][:2] != many[key][1][:2]]
    if unlike:
        return f"dtypes or shapes differ: {fold(unlike)}"
    unlike = [key for key in one if not _same_bytes(source, (single, one[key]), many[key])]
    return f"values differ: {fold(unlike)}" if unlike else None


def _describe_names(only_single: set[str], only_index: set[str], single: str) -> str:
    parts = [
        f"only {where} has {fold(names, limit=3)}"
        for where, names in ((single, only_single), ("the index", only_index))
        if names
    ]
    return "; ".join(parts)


def _places(source: TensorSource, index: CheckpointIndex) -> Mapping[str, Place]:
    places = {}
    for file, keys in index.by_file().items():
        tensors = read_source_header(source, file).tensors
        places.update({key: (file, tensors[key]) for key in keys if key in tensors})
    return places


def _same_bytes(source: TensorSource, one: Place, other: Place) -> bool:
    shift = other[1].begin - one[1].begin
    for begin, end in cut([(one[1].begin, one[1].end)], _CHUNK_BYTES):
        if not (source.is_here(one[0]) and source.is_here(other[0])):
            return True
        if source.read_bytes(one[0], begin, end) != source.read_bytes(other[0], begin + shift, end + shift):
            return False
    return True
