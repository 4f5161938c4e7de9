"""Amounts and tables as people read them: as text, and as HTML in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


@dataclass(frozen=True)
class Table:
    """Rows of cells, the header first.

    Attributes:
        rows: All of equal length.
        caption: A line over it.
    """

    rows: Sequence[Sequence[str]]
    caption: str = ""


Page: TypeAlias = "Sequence[str | Table]"
"""Texts and tables, one below the other: what something looks like, wherever it is shown."""


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


def printable(text: str) -> str:
    r"""Show characters that would do something to a terminal by their escapes: names in files are anybody's.

    Example:
        >>> print(printable("model.\x1b[31m.weight"))
        model.\x1b[31m.weight
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def as_text(page: Page) -> str:
    """Set out a page as text, its tables in columns.

    Example:
        >>> print(as_text(["It fits.", Table([["rank", "blocks"], ["0", "0-11"]], "by bytes")]))
        It fits.
        <BLANKLINE>
        by bytes
        rank  blocks
        0     0-11
    """
    return "\n\n".join(_text_table(part) if isinstance(part, Table) else printable(part) for part in page)


def as_html(page: Page) -> str:
    """Set out a page as HTML; whatever stands in it is escaped.

    Example:
        >>> as_html(["<b>"])
        '<p>&lt;b&gt;</p>'
    """
    return "".join(_html_table(part) if isinstance(part, Table) else _paragraph(part) for part in page)


def _text_table(table: Table) -> str:
    rows = [list(map(printable, row)) for row in table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([printable(table.caption), *lines] if table.caption else lines)


def _html_table(table: Table) -> str:
    header, *others = ["".join(_cells(row, "td" if at else "th")) for at, row in enumerate(table.rows)]
    caption = f"<caption>{_escape(table.caption)}</caption>" if table.caption else ""
    body = "".join(f"<tr>{row}</tr>" for row in others)
    return f"<table>{caption}<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def _cells(row: Iterable[str], tag: str) -> list[str]:
    return [f"<{tag}>{_escape(cell)}</{tag}>" for cell in row]


def _paragraph(text: str) -> str:
    return f"<p>{_escape(text)}</p>".replace("\n", "<br>")


def _escape(text: str) -> str:
    from html import escape  # its table of entities takes a while, and only notebooks need it

    return escape(printable(text))
