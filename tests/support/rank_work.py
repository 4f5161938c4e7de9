"""What the ranks of `test_local_ranks.py` do. Their processes import this module, so it is a light one."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from patchers.errors import CollectiveError
from sharded_ckpt.local_ranks import Place, on_ranks


def tell(place: Place, *arguments: Any) -> tuple[int, int, tuple[Any, ...]]:
    print("nobody shall see this")
    time.sleep(0.05 * (place.world_size - place.rank))  # the last rank answers first
    return place.rank, place.world_size, arguments


def process_id(place: Place) -> int:
    return os.getpid()


def fail_on_rank_1(place: Place, how: str, pids: Path) -> Any:
    (pids / str(place.rank)).write_text(str(os.getpid()))
    if place.rank != 1:
        time.sleep(600)
    print("rank 1 is about to fail", file=sys.stderr, flush=True)
    if how == "raise":
        raise ValueError("the disk is gone")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        sys.exit(3)
    if how == "answer":
        return lambda: None  # does not pickle
    time.sleep(600)
    return None


def fail_together(place: Place) -> None:
    raise CollectiveError("loading x failed on rank 0 of 2: OSError: disk gone; rank 1 was well")


def be_orphaned(folder: str) -> None:
    """The main function of a parent that will be killed."""
    on_ranks(fail_on_rank_1, ["hang", Path(folder)], world_size=2, timeout=600)
