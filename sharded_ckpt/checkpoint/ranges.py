"""Byte ranges of files: joined and cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

Range: TypeAlias = "tuple[int, int]"
"""Offsets of the first byte and after the last byte."""

GAP_BYTES = 2**20
"""Reading this much in vain is cheaper than another request."""


def coalesce(ranges: Iterable[Range], gap: int = GAP_BYTES) -> list[Range]:
    """Join sorted ranges that are at most `gap` bytes apart.

    Example:
        >>> coalesce([(0, 10), (12, 20), (50, 60)], gap=4)
        [(0, 20), (50, 60)]
    """
    joined: list[Range] = []
    for begin, end in ranges:
        if joined and begin - joined[-1][1] <= gap:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        elif end > begin:
            joined.append((begin, end))
    return joined


def cut(ranges: Iterable[Range], size: int) -> Iterator[Range]:
    """Cut ranges into pieces of at most `size` bytes.

    Example:
        >>> list(cut([(0, 10), (20, 23)], size=4))
        [(0, 4), (4, 8), (8, 10), (20, 23)]
    """
    for begin, end in ranges:
        for offset in range(begin, end, size):
            yield offset, min(offset + size, end)
