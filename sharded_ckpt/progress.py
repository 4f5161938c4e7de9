"""One bar for long work: on the main rank, on a terminal, and never unasked elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_progress(
    wanted: bool | Callable[[int], object] | None, total: int, is_main: bool, doing: str = "loading"
) -> Iterator[Callable[[int], object] | None]:
    """Yield what is to be told each number of bytes done, or None.

    Args:
        wanted: True or False; None for a terminal's main rank unless `HF_HUB_DISABLE_PROGRESS_BARS` is set;
            or a function of the caller's own.
        total: Bytes to be done.
        is_main: Whether this is the main rank.
        doing: What the bar is called.
    """
    with unit_progress(wanted, total, is_main, doing, "B") as count:
        yield count


@contextmanager
def unit_progress(
    wanted: bool | Callable[[int], object] | None, total: int | None, is_main: bool, doing: str, unit: str
) -> Iterator[Callable[[int], object] | None]:
    """Yield what is to be told each number of units done, or None.

    Args:
        wanted: As for `byte_progress`.
        total: Units to be done; None if nobody knows.
        is_main: Whether this is the main rank.
        doing: What the bar is called.
        unit: What is counted; "B" is shown in powers of 1024.
    """
    if callable(wanted):
        yield wanted
        return
    if wanted is None:
        from huggingface_hub.utils import are_progress_bars_disabled

        wanted = sys.stderr.isatty() and not are_progress_bars_disabled()
    if not (wanted and is_main):
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit=unit, unit_scale=unit == "B", unit_divisor=1024, desc=doing) as bar:
        yield bar.update
