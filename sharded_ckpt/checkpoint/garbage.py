"""Cyclic garbage collection, kept out of loops that make many small objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collection() -> Iterator[None]:
    """Switch the cyclic collector off inside, and on again if it was on.

    Making a hundred thousand entries or tensors triggers hundreds of collections that find nothing and cost
    up to five times the work itself. Nor are they made up for afterwards: what is new counts as old then.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():  # else unfreezing would undo what the process has frozen
                gc.freeze()
                gc.unfreeze()
            gc.enable()
