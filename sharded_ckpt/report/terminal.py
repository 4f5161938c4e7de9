"""Pages on a terminal: coloured and aligned by rich, where that is installed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, TextIO

from patchers.tables import Page, Table, as_text, printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text

_NUMBER = re.compile(r"-|-?[\d.]+(?:%|x| ?[kMGTP]?B?)?")
_STYLES = (
    (r"(?m)^ *note: .*", "yellow"),
    (r"^it fits$|\b(?:are|is) equal$|: no problems\b", "bold green"),
    (r"^the model does not fit\b|\bdiffer$|: \d+ problems?\b", "bold red"),
    (r"\bno-op\b|^-$|^0 B$", "dim"),
    (r"\blinear\b", "magenta"),
    (r"^\d+ experts\b", "green"),
    (r"^[1-9]\d{2,}%$|^-[\d.]+ \w+$", "bold red"),
)
"""What stands out, and how: regular expressions over a text or a cell."""


def write_page(page: Page, stream: TextIO) -> None:
    """Write a page, coloured if the stream is a terminal that shows colours.

    Plain text is written where it is none, where `NO_COLOR` is set (https://no-color.org) or `TERM` is
    "dumb", and where rich is not installed.
    """
    if _shows_colors(stream):
        _write_colored(page, stream)
    else:
        stream.write(f"{as_text(page)}\n")


def _shows_colors(stream: TextIO) -> bool:
    is_wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return stream.isatty() and is_wanted and find_spec("rich") is not None


def _write_colored(page: Page, stream: TextIO) -> None:
    from rich.console import Console
    from rich.text import Text

    def styled(text: str) -> Text:
        shown = Text(printable(text))
        for pattern, style in _STYLES:
            shown.highlight_regex(pattern, style)
        return shown

    console = Console(file=stream, highlight=False, emoji=False, markup=False)
    for number, part in enumerate(page):
        if number:
            console.print()
        if isinstance(part, Table):
            if part.caption:
                console.print(Text(printable(part.caption), style="bold"), soft_wrap=True)
            console.print(_grid(part, styled))
        else:
            console.print(styled(part), soft_wrap=True)


def _grid(table: Table, styled: Callable[[str], Text]) -> RichTable:
    """Return a table as rich sets it out: numbers at the right, long names broken, never cut."""
    from rich.table import Table as RichTable

    header, *rows = table.rows
    grid = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
    for at, name in enumerate(header):
        cells = [row[at] for row in rows if row[at]]
        are_numbers = bool(cells) and all(map(_NUMBER.fullmatch, cells)) and at > 0
        grid.add_column(styled(name), justify="right" if are_numbers else "left", overflow="fold")
    for row in rows:
        grid.add_row(*map(styled, row))
    return grid
