"""Storages that fail, stop or count: the real one, with something happening at a chosen operation."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from sharded_ckpt.checkpoint.storage import OPERATIONS, LocalStorage


class WatchedStorage(LocalStorage):
    """The real storage; `before` is told the number (from 1) and the name of every operation."""

    def __init__(self, *, durable: bool = True) -> None:
        super().__init__(durable=durable)
        self.log: list[str] = []
        self._lock = threading.Lock()

    def before(self, number: int, operation: str) -> None:
        """Do nothing."""

    def _enter(self, operation: str) -> None:
        with self._lock:
            self.log.append(operation)
            number = len(self.log)
        self.before(number, operation)


def _watched(operation: str) -> Callable[..., Any]:
    real = getattr(LocalStorage, operation)

    def method(self: WatchedStorage, *args: Any, **options: Any) -> Any:
        self._enter(operation)
        return real(self, *args, **options)

    return method


for _operation in OPERATIONS:
    setattr(WatchedStorage, _operation, _watched(_operation))


class FaultyStorage(WatchedStorage):
    """Raises at the n-th operation: once, or from then on."""

    def __init__(
        self, fail_at: int, error: BaseException, *, forever: bool = False, durable: bool = True
    ) -> None:
        super().__init__(durable=durable)
        self.fail_at, self.error, self.forever = fail_at, error, forever

    def before(self, number: int, operation: str) -> None:
        if number == self.fail_at or (self.forever and number > self.fail_at):
            raise type(self.error)(*self.error.args)

    def close(self, fd: int) -> None:
        try:
            self._enter("close")
        finally:  # a descriptor is gone also when closing it fails
            os.close(fd)

    def unlock(self, fd: int) -> None:
        try:
            self._enter("unlock")
        finally:
            LocalStorage.unlock(self, fd)

    @property
    def failed(self) -> bool:
        return len(self.log) >= self.fail_at


class DeadlyStorage(WatchedStorage):
    """Kills its process right before the n-th operation."""

    def __init__(self, die_at: int, *, durable: bool = False) -> None:
        super().__init__(durable=durable)
        self.die_at = die_at

    def before(self, number: int, operation: str) -> None:
        if number == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


class NoExchange(LocalStorage):
    """A file system that cannot exchange two names, as NFS."""

    def exchange(self, first: Any, second: Any) -> None:
        raise OSError(22, "Invalid argument", first, None, second)


class OnlyInside(LocalStorage):
    """A directory that may be written to, in one that may not."""

    directory = ""

    def make_directory(self, path: Any) -> None:
        if not os.fspath(path).startswith(self.directory + os.sep):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        super().make_directory(path)
