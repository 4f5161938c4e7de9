"""The one thread through which a process talks to the store of its process group, and shows that it lives."""

from __future__ import annotations

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

LEFT = b"left"
"""The last sign of life of a rank whose process ends, or that has done with its process group."""

_LINGER = 2.0  # seconds


class StoreLostError(RuntimeError):
    """The store through which ranks agree does not answer any more."""


def life_of(rank: int) -> str:
    """Return the key under which a rank shows that it lives."""
    return f"alive/{rank}"


def read_by(rank: int) -> str:
    """Return the key under which a rank says which round's verdict it has read last."""
    return f"read/{rank}"


class StoreThread:
    """Asks a store in a thread of its own, which also shows every `period` seconds that this rank lives.

    A request to a store whose host is frozen never returns, so nobody may make one who must go on.
    """

    def __init__(self, store: Store, rank: int, world_size: int, period: float) -> None:
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lost: str | None = None
        thread = threading.Thread(
            target=_attend,
            args=(store, self._jobs, rank, world_size, period),
            name="sharded_ckpt store",
            daemon=True,
        )
        thread.start()
        # A daemon that wakes up in a dying interpreter may abort it; so end it first.
        weakref.finalize(self, _dismiss, self._jobs, thread)

    def ask(self, question: Callable[[Store], T], seconds: float) -> T:
        """Return `question(store)`.

        Raises:
            StoreLostError: No answer came within `seconds`, now or earlier, or the store is gone.
        """
        if self._lost:
            raise StoreLostError(self._lost)
        answer: Future[T] = Future()
        self._jobs.put((question, answer))
        try:
            return answer.result(seconds)
        except FutureTimeout:
            self._lost = f"does not answer for {seconds:g} s"
        except RuntimeError as error:  # torch's DistNetworkError is one, too
            self._lost = f"cannot be reached ({str(error).splitlines()[0]})"
        raise StoreLostError(self._lost)


def _attend(store: Store, jobs: queue.SimpleQueue[Any], rank: int, world_size: int, period: float) -> None:
    signs = itertools.count(1)
    due = time.monotonic()
    while True:
        if time.monotonic() >= due:
            if not _sign(store, rank, str(next(signs))):
                due = float("inf")  # the store is gone: whoever asks next will hear of it
            else:
                due = time.monotonic() + period
        try:
            job = jobs.get(timeout=min(period, max(0.0, due - time.monotonic())))
        except queue.Empty:
            continue
        if job is None:
            _leave(store, rank, world_size)
            return
        question, answer = job
        try:
            answer.set_result(question(store))
        except BaseException as error:
            answer.set_exception(error)
        del question, answer, job


def _sign(store: Store, rank: int, text: str) -> bool:
    try:
        store.set(life_of(rank), text)
    except RuntimeError:
        return False
    return True


def _leave(store: Store, rank: int, world_size: int) -> None:
    """Say that this rank leaves; rank 0, where the store may live, first lets the others read the verdict."""
    limit = time.monotonic() + _LINGER
    while rank == 0 and time.monotonic() < limit and not _all_have_read(store, world_size):
        time.sleep(0.01)
    _sign(store, rank, LEFT.decode())


def _all_have_read(store: Store, world_size: int) -> bool:
    try:
        last = _value(store, read_by(0))
        return all(
            _value(store, read_by(rank)) == last or _value(store, life_of(rank)) == LEFT
            for rank in range(1, world_size)
        )
    except RuntimeError:
        return True


def _value(store: Store, key: str) -> bytes | None:
    return store.get(key) if store.check([key]) else None


def _dismiss(jobs: queue.SimpleQueue[Any], thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(_LINGER + 1.0)
