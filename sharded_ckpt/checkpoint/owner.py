"""Whose a save is: one of a process, told from every other one on this machine and on others."""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

_alive_here: set[str] = set()  # the nonces of the saves of this process


@dataclass(frozen=True)
class Owner:
    """One save of one process, by what tells it from every other one.

    Example:
        >>> owner = Owner.of_this_process()
        >>> Owner.parse(str(owner)) == owner, owner.is_dead()
        (True, True)
    """

    place: str
    """The running kernel and its PID namespace: where the process can be asked for."""
    pid: int
    start: int
    """When the process started, in ticks since boot: process numbers come back."""
    nonce: str

    def __str__(self) -> str:
        return f"{self.place}-{self.pid}-{self.start}-{self.nonce}"

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """Return the owner that `str` gave the text of, or None if it gave no such text."""
        parts = text.split("-")
        if len(parts) != 4 or not (parts[1].isdigit() and parts[2].isdigit()):
            return None
        return cls(parts[0], int(parts[1]), int(parts[2]), parts[3])

    @classmethod
    def of_this_process(cls) -> Owner:
        """Return a new owner; it counts as dead until it begins."""
        return cls(_place(), os.getpid(), _start_of(os.getpid()) or 0, secrets.token_hex(4))

    def begin(self) -> None:
        """Count as alive from now on."""
        _alive_here.add(self.nonce)

    def end(self) -> None:
        """Count as dead from now on, though the process lives."""
        _alive_here.discard(self.nonce)

    def is_dead(self) -> bool | None:
        """Return whether this save is over; None if only another machine or container could tell."""
        if self.place != _place():
            return None
        if self.pid == os.getpid() and self.start == (_start_of(self.pid) or 0):
            return self.nonce not in _alive_here
        return _start_of(self.pid) != self.start


@functools.cache
def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = socket.gethostname()
    return hashlib.sha256(boot.encode()).hexdigest()[:12]


def _start_of(pid: int) -> int | None:
    """Return when a process started; 0 where the system does not say; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if os.path.exists("/proc/self/stat"):
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    return None if fields[0] in "ZX" else int(fields[19])
