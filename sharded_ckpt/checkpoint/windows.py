"""Tensors of a file cut into windows: ranges of bounded size that are read, used and let go one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from sharded_ckpt.checkpoint.entry import TensorEntry

Item: TypeAlias = "tuple[str, TensorEntry]"
"""A tensor of a file."""

Items: TypeAlias = "Sequence[Item]"
"""Tensors of one file, in file order."""


class Piece(NamedTuple):
    """A part of a tensor, or the whole."""

    key: str
    entry: TensorEntry
    begin: int
    """Offset of the first byte, from the begin of the file."""
    end: int


class Window(NamedTuple):
    """A range of a file, with the pieces of tensors in it."""

    begin: int
    end: int
    pieces: list[Piece]


def cut_windows(items: Items, size: int, gap: int = 0) -> Iterator[Window]:
    """Cut the tensors of a file into windows of at most `size` bytes.

    Args:
        items: The tensors; empty ones are in no window.
        size: Bytes, a multiple of 16, so that no element of any dtype is cut in two.
        gap: The most bytes not wanted between two tensors of one window.

    Example:
        >>> items = [("a", TensorEntry("U8", (20,), 0, 20)), ("b", TensorEntry("U8", (40,), 20, 60))]
        >>> [(begin, end, len(pieces)) for begin, end, pieces in cut_windows(items, size=32)]
        [(0, 20, 1), (20, 52, 1), (52, 60, 1)]
    """
    pieces = (
        Piece(key, entry, begin, min(begin + size, entry.end))
        for key, entry in items
        for begin in range(entry.begin, entry.end, size)
    )
    return _group(pieces, size, gap)


def whole_windows(items: Items, size: int, gap: int = 0) -> Iterator[Window]:
    """Group the tensors of a file into windows of at most `size` bytes, larger ones alone; none is cut.

    Example:
        >>> items = [("a", TensorEntry("U8", (20,), 0, 20)), ("b", TensorEntry("U8", (40,), 20, 60))]
        >>> [(begin, end, len(pieces)) for begin, end, pieces in whole_windows(items, size=32)]
        [(0, 20, 1), (20, 60, 1)]
    """
    return _group((Piece(key, entry, entry.begin, entry.end) for key, entry in items), size, gap)


def _group(pieces: Iterable[Piece], size: int, gap: int) -> Iterator[Window]:
    group: list[Piece] = []
    for piece in pieces:
        if group and (piece.end - group[0].begin > size or piece.begin - group[-1].end > gap):
            yield Window(group[0].begin, group[-1].end, group)
            group = []
        group.append(piece)
    if group:
        yield Window(group[0].begin, group[-1].end, group)
