"""Amounts and tables as people read them, in a terminal and in a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


def amount(cost: float, by: str) -> str:
    """Show a cost in its unit.

    Example:
        >>> amount(71.2e9, "bytes"), amount(3, "count"), amount(0.0123, "seconds")
        ('71.20 GB', '3', '12.30 ms')
    """
    if by == "seconds":
        return f"{cost * 1e3:.2f} ms" if cost < 1 else f"{cost:.2f} s"
    unit = "B" if by.startswith("bytes") else ""
    factor, prefix = next((pair for pair in _PREFIXES if abs(cost) >= pair[0]), (1, ""))
    return (f"{cost / factor:.2f} {prefix}{unit}" if prefix else f"{cost:g} {unit}").rstrip()


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Set out rows of cells, the header first, in columns.

    Example:
        >>> print(as_text([["rank", "blocks"], ["0", "0-11"]]))
        rank  blocks
        0     0-11
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_html(caption: str, rows: Sequence[Sequence[str]]) -> str:
    """Set out rows of cells, the header first, as an HTML table."""
    header, *others = ["".join(_cells(row, "td" if at else "th")) for at, row in enumerate(rows)]
    body = "".join(f"<tr>{row}</tr>" for row in others)
    return f"<table><caption>{html.escape(caption)}</caption><tr>{header}</tr>{body}</table>"


def _cells(row: Sequence[str], tag: str) -> list[str]:
    return [f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row]
