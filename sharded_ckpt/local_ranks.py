"""Ranks on one machine: fresh processes that do the same work, and a parent that waits, but not for ever."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from patchers.errors import CollectiveError
from patchers.names import fold_indices

_GRACE = 2.0  # seconds that the others have, after a first failure, to say what they saw of it
_EXIT = 5.0  # seconds that a rank may take to leave after its work
_LAST_WORDS = 2000  # characters


@dataclass(frozen=True)
class Place:
    """Where one of the processes stands.

    Attributes:
        rank: From 0.
        world_size: Number of processes.
        meeting: A file path for `init_process_group(init_method="file://…")`.
        timeout: Seconds after which the parent ends what is left.
    """

    rank: int
    world_size: int
    meeting: str
    timeout: float


def on_ranks(
    work: Callable[..., Any], arguments: Sequence[Any] = (), *, world_size: int, timeout: float
) -> list[Any]:
    """Run `work(place, *arguments)` once on every rank.

    The processes are spawned, so they inherit no threads, and they print nothing: what they write to stdout
    and stderr (gloo does, on its own) is kept for the error. None of them outlives this call or this process.

    Args:
        work: A function of a module; `place` is a `Place`.
        arguments: These, and what `work` returns, must pickle.
        world_size: Number of ranks.
        timeout: Seconds for everything.

    Returns:
        What the ranks returned, in rank order.

    Raises:
        CollectiveError: Some ranks raised, died or did not answer in time; it says which and why.
    """
    with tempfile.TemporaryDirectory(prefix="sharded-ckpt-ranks-") as folder:
        meeting = str(Path(folder) / "meeting")
        ranks: list[_Rank] = []
        try:
            for rank in range(world_size):
                place = Place(rank, world_size, meeting, timeout)
                ranks.append(_Rank(place, Path(folder) / f"rank{rank}.log", work, arguments))
            return _gather(ranks, time.monotonic() + timeout)
        finally:
            for rank_ in ranks:
                rank_.end()


@dataclass(frozen=True)
class _Done:
    """What a rank returned."""

    result: Any


@dataclass(frozen=True)
class _Failure:
    """Why a rank has no result."""

    text: str
    names_ranks: bool = False  # a verdict of the ranks, the same on all of them


class _Rank:
    """The parent's handle of one rank."""

    def __init__(self, place: Place, log: Path, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.place, self._log = place, log
        self.pipe, theirs = context.Pipe(duplex=False)
        task = (theirs, str(log), work, place, tuple(arguments))
        self._process: BaseProcess = context.Process(target=_serve, args=task, daemon=True)
        self._process.start()
        theirs.close()  # so that the death of the process closes the pipe
        self.answer: Any = None

    def receive(self) -> None:
        """Take the answer that is there; the end of the pipe is one, too."""
        try:
            self.answer = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            self._process.join(_EXIT)
            self.answer = _Failure(f"{_death(self._process.exitcode)}{self._last_words()}")

    def end(self) -> None:
        """Leave no process behind."""
        if isinstance(self.answer, _Done):
            self._process.join(_EXIT)
        self._process.kill()
        self._process.join()
        self._process.close()
        self.pipe.close()

    def _last_words(self) -> str:
        said = self._log.read_text(errors="replace").strip() if self._log.exists() else ""
        return f"; it had written: {said[-_LAST_WORDS:]}" if said else ""


def _gather(ranks: list[_Rank], deadline: float) -> list[Any]:
    waiting = {rank.pipe: rank for rank in ranks}
    failures: dict[int, _Failure] = {}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[call-overload]
            rank.receive()
            if isinstance(rank.answer, _Failure):
                failures[rank.place.rank] = rank.answer
                deadline = min(deadline, time.monotonic() + _GRACE)
    if waiting and not failures:
        silent = _Failure(f"no answer within {ranks[0].place.timeout:g} seconds")
        failures = {rank.place.rank: silent for rank in waiting.values()}
    if failures:
        raise _error(failures, len(ranks))
    return [rank.answer.result for rank in ranks]


def _error(failures: Mapping[int, _Failure], count: int) -> CollectiveError:
    """Say what failed, in the order in which it was heard: the first is most likely the cause."""
    ranks_of: dict[_Failure, list[int]] = {}
    for rank, failure in failures.items():
        ranks_of.setdefault(failure, []).append(rank)
    parts = []
    for failure, ranks in ranks_of.items():
        who = f"{'rank' if len(ranks) == 1 else 'ranks'} {fold_indices(ranks)} of {count} failed: "
        parts.append(failure.text if failure.names_ranks else who + failure.text)
    return CollectiveError("; ".join(parts), {rank: failure.text for rank, failure in failures.items()})


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"the process was killed by {signal.Signals(-exitcode).name}"
    return f"the process ended with exit code {exitcode}"


# In the rank -----------------------------------------------------------------------------------------------


def _serve(
    pipe: Connection, log: str, work: Callable[..., Any], place: Place, arguments: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its ranks
    threading.Thread(target=_follow_parent, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        _send(pipe, _Done(work(place, *arguments)))
        return
    except CollectiveError as error:
        _send(pipe, _Failure(str(error), names_ranks=True))
    except Exception as error:
        traceback.print_exc()
        _send(pipe, _Failure(f"{type(error).__name__}: {error}"))
    time.sleep(2 * _GRACE)  # leaving now would cut connections, and the others would report that, too


def _send(pipe: Connection, answer: _Done | _Failure) -> None:
    """Send all of an answer: of a tensor, `pipe.send` only says where it lies in a process about to end."""
    pipe.send_bytes(pickle.dumps(answer))


def _follow_parent() -> None:
    """Die with the parent, even if it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
