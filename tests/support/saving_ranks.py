"""What gloo ranks run to save together, with faults of their own."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

from patchers.errors import CollectiveError
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.collective.control_group import control_group
from support.checkpoints import fill
from support.storages import FaultyStorage, WatchedStorage


def save(directory: str, version: int) -> None:
    control = control_group(timeout=20)
    with transaction(directory, control, durable=False) as staged:
        fill(staged, version, control.rank, control.world_size)


def save_repeatedly_with_faults(parent: str, operations: list[str]) -> list[tuple[str, str, list[int]]]:
    """Save once for each rank and operation, that rank failing there; return what this one was told."""
    control, told = control_group(timeout=20), []
    for operation in operations:
        for faulty in range(control.world_size):
            storage = _FaultyAt(operation) if control.rank == faulty else WatchedStorage(durable=False)
            try:
                with transaction(Path(parent) / "ckpt", control, storage=storage) as staged:
                    fill(staged, 2, control.rank, control.world_size)
            except CollectiveError as error:
                told.append((operation, str(error), sorted(error.failures)))
    return told


class _FaultyAt(FaultyStorage):
    """Fails at the first operation of a name."""

    def __init__(self, operation: str) -> None:
        super().__init__(0, OSError(errno.ENOSPC, "No space left on device"), durable=False)
        self.operation = operation

    def before(self, number: int, operation: str) -> None:
        if operation == self.operation and self.log.count(operation) == 1:
            raise OSError(*self.error.args)


def one_goes_while_saving(
    directory: str, rank: int, how: str, timeout: float
) -> tuple[str, list[int], float]:
    """One rank dies or freezes while it writes; return what the others are told, and after how long."""
    control = control_group(timeout=timeout)
    control.vote(None, "starting")
    began = time.monotonic()
    try:
        with transaction(directory, control, durable=False) as staged:
            fill(staged, 2, control.rank, control.world_size)
            if control.rank == rank:
                os.kill(os.getpid(), getattr(signal, how))
    except CollectiveError as error:
        return str(error), sorted(error.failures), time.monotonic() - began
    raise AssertionError("nobody noticed")
