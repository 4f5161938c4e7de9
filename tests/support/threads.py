"""Ranks as threads of one process: a real Coordinator, with real waiting, that starts in no time."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

from patchers.errors import CollectiveError

TIMEOUT = 20.0


class ThreadRank:
    """One rank of a group of threads."""

    def __init__(self, rank: int, world_size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, world_size
        self._board, self._barrier = board, barrier

    def gather(self, value: Any, doing: str) -> list[Any]:
        self._board[self.rank] = value
        self._wait(doing)
        values = copy.deepcopy(list(self._board))
        self._wait(doing)
        return values

    def vote(self, error: BaseException | None, doing: str) -> None:
        said = None if error is None else f"{type(error).__name__}: {error}"
        failures = {rank: text for rank, text in enumerate(self.gather(said, doing)) if text}
        if failures:
            texts = "; ".join(f"rank {rank}: {text}" for rank, text in failures.items())
            raise CollectiveError(f"{doing} failed on {texts}", failures) from error

    def _wait(self, doing: str) -> None:
        try:
            self._barrier.wait(TIMEOUT)
        except threading.BrokenBarrierError:
            raise CollectiveError(f"{doing}: a rank did not come") from None


def run_ranks(world_size: int, work: Callable[[ThreadRank], Any]) -> list[Any]:
    """Run `work` on every rank; return its results, an exception being one."""
    board, barrier = [None] * world_size, threading.Barrier(world_size)
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRank(rank, world_size, board, barrier))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
