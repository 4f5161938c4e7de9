"""How ranks come to one verdict about a piece of work, even when some of them are dead, frozen or late.

Every rank writes its entry to the store of the process group; whoever first sees that all entries are there,
or that waiting has become pointless, proposes a verdict. The store keeps the first proposal and every rank
takes that one: all ranks read the same bytes, whatever each of them saw. Collectives cannot give this: after
a timeout the group is dead, and each survivor blames another rank.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from sharded_ckpt.collective.store_thread import LEFT, StoreThread, life_of, read_by
from sharded_ckpt.collective.verdict import Verdict

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

SILENCE = 60.0
"""Seconds without a sign of life after which a rank counts as dead or frozen."""

_PIECE = 1 << 20  # bytes; a TCPStore drops the connection at values over 8 MB


class Agreement:
    """One rank's end of a series of rounds. All ranks go through the same rounds in the same order.

    Args:
        store: The store that the ranks share, with a prefix of its own.
        rank: This rank.
        world_size: Number of ranks.
        timeout: Seconds that a round may take; it sets how often this rank shows that it lives.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float) -> None:
        self.rank, self.world_size = rank, world_size
        self._silence = silence_of(timeout)
        self._thread = StoreThread(store, rank, world_size, self._silence / 8)
        self._rounds = itertools.count()
        self._signs: dict[int, tuple[bytes, float]] = {}
        self._written: list[str] = []
        self._old: list[str] = []

    def decide(self, entry: Any, timeout: float) -> Verdict:
        """Give this rank's entry (plain JSON data) and return the verdict of the round.

        Args:
            entry: What this rank says.
            timeout: Seconds to wait for a rank that lives but does not come; one without a sign of life is
                given up after `SILENCE`, or three quarters of the timeout.

        Raises:
            StoreLostError: The store itself is gone or frozen.
        """
        number = next(self._rounds)
        self._old, self._written = self._written, []
        self._put(_entry(number, self.rank), entry)
        began = looked = time.monotonic()
        while (verdict := self._verdict(number)) is None:
            waited = time.monotonic() - began
            if self._ask(lambda store: store.check(self._entries(number))):
                self._propose(number, {})
                continue
            if time.monotonic() - looked > silence_of(timeout) / 16:
                looked = time.monotonic()
                self._give_up(number, waited, timeout)
            time.sleep(min(0.1, 0.0005 + waited / 20))
        self._ask(lambda store: store.set(read_by(self.rank), str(number)))
        if not verdict.absent:  # all ranks are here, so all have read what belongs to the round before
            self._ask(lambda store: [store.delete_key(key) for key in self._old])
        return verdict

    def _verdict(self, number: int) -> Verdict | None:
        def read(store: Store) -> bytes | None:
            return store.get(_verdict(number)) if store.check([_verdict(number)]) else None

        by = self._ask(read)
        if by is None:
            return None
        entries, absent = self._read(_proposal(number, int(by)))
        return Verdict(tuple(entries), {int(rank): why for rank, why in absent.items()})

    def _give_up(self, number: int, waited: float, timeout: float) -> None:
        """Propose a verdict without some ranks, if waiting for them has become pointless."""
        silence = silence_of(timeout)
        lost, late = {}, {}
        for rank in self._missing(number):
            sign, since = self._sign_of_life(rank)
            if sign == LEFT:
                lost[rank] = "its process has ended; see what it printed"
            elif sign and time.monotonic() - since > silence:
                lost[rank] = f"no sign of life for {silence:.3g} s (dead or frozen)"
            else:
                late[rank] = f"it did not get there within {timeout:g} s (do all ranks make this call?)"
        if lost or waited > timeout:
            self._propose(number, lost or late)

    def _propose(self, number: int, absent: dict[int, str]) -> None:
        missing = set(self._missing(number))
        blamed = {rank: why for rank, why in absent.items() if rank in missing}
        if missing and not blamed:
            return  # those to be blamed came at the last moment: look again
        ranks = range(self.world_size)
        entries = [None if rank in missing else self._read(_entry(number, rank)) for rank in ranks]
        self._put(_proposal(number, self.rank), [entries, blamed])
        chosen = self._ask(lambda store: store.compare_set(_verdict(number), "", str(self.rank)))
        if int(chosen) == self.rank:
            self._written.append(_verdict(number))

    def _entries(self, number: int) -> list[str]:
        return [_entry(number, rank) for rank in range(self.world_size)]

    def _missing(self, number: int) -> list[int]:
        there = self._ask(lambda store: [store.check([key]) for key in self._entries(number)])
        return [rank for rank, here in enumerate(there) if not here]

    def _sign_of_life(self, rank: int) -> tuple[bytes, float]:
        """Return the last sign of a rank and the time since when it has been the same."""

        def read(store: Store) -> bytes:
            return store.get(life_of(rank)) if store.check([life_of(rank)]) else b""

        sign = self._ask(read)
        if rank not in self._signs or self._signs[rank][0] != sign:
            self._signs[rank] = (sign, time.monotonic())
        return self._signs[rank]

    def _put(self, name: str, value: Any) -> None:
        data = json.dumps(value)
        pieces = {f"{name}/{at}": data[at : at + _PIECE] for at in range(0, len(data), _PIECE)}

        def write(store: Store) -> None:
            for key, piece in pieces.items():
                store.set(key, piece)
            store.set(name, str(len(data)))  # last: who sees it sees everything

        self._ask(write)
        self._written += [*pieces, name]

    def _read(self, name: str) -> Any:
        def read(store: Store) -> bytes:
            size = int(store.get(name))
            return b"".join(store.multi_get([f"{name}/{at}" for at in range(0, size, _PIECE)]))

        return json.loads(self._ask(read))

    def _ask(self, question: Callable[[Store], T]) -> T:
        return self._thread.ask(question, self._silence)


def silence_of(timeout: float) -> float:
    """Return after how much silence a rank is given up: before the timeout, to tell the better reason."""
    return min(SILENCE, 0.75 * timeout)


def _entry(number: int, rank: int) -> str:
    return f"{number}/entry/{rank}"


def _proposal(number: int, rank: int) -> str:
    return f"{number}/proposal/{rank}"


def _verdict(number: int) -> str:
    return f"{number}/verdict"
