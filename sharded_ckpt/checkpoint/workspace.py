"""The private place beside a directory where a save is prepared, and what dead saves left in such places.

`.NAME.saving` beside (or, where that is not possible, inside) the directory NAME belongs to one save at a
time: to the process that put it there. It holds `owner`, which says what process that is, and `new/`, the
stage. While it is made and while it is removed it is called `.NAME.saving-OWNER`, so that it is known at any
moment whose it is. Of a NAME that is too long for that, the begin and a digest stand there.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint import journal
from sharded_ckpt.checkpoint.storage import OCCUPIED, LocalStorage
from sharded_ckpt.checkpoint.tree import (
    is_mount_point,
    remove_tree,
    walk,
    write_small,
)

logger = logging.getLogger(__name__)

ABANDONED_AFTER: Final = 24 * 3600.0
"""Seconds without a change after which a workspace counts as dead if its machine cannot be asked."""

_NAME = re.compile(r"\.(?P<target>.+)\.saving(?:-(?P<owner>[0-9a-f]+-\d+-\d+-[0-9a-f]+))?", re.DOTALL)
_MAX_NAME_BYTES = 190  # of the 255 that file systems take, `.`, `.saving-` and an owner need some 50
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
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
        """Return a new owner; it counts as dead until a workspace is acquired for it."""
        return cls(_place(), os.getpid(), _start_of(os.getpid()) or 0, secrets.token_hex(4))

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


@dataclass(frozen=True)
class Workspace:
    """A workspace that this save owns."""

    path: Path
    owner: Owner
    inside: bool
    """Whether it lies in the directory that is saved to."""

    @property
    def stage(self) -> Path:
        """Where the new content of the directory is put together."""
        return self.path / journal.STAGE


def locate(target: Path, *, inside: bool) -> Path:
    """Return where the workspace for a directory lies."""
    return (target if inside else target.parent) / f".{_short(target.name)}.saving"


def _short(name: str) -> str:
    """Return the name of a directory, or what stands for a long one and leaves room for the rest."""
    raw = os.fsencode(name)
    return name if len(raw) <= _MAX_NAME_BYTES else f"{name[:32]}-{hashlib.sha256(raw).hexdigest()[:16]}"


def is_workspace(name: str) -> bool:
    """Return whether a name in a directory is that of a workspace, in use or not."""
    return _NAME.fullmatch(name) is not None


def unfinished(target: Path) -> Path | None:
    """Return the workspace of a save that is changing names in a directory and is not through, if any.

    Meanwhile the tensors that an index lists are all of one save, but small files may be those of the other.
    """
    for inside in (False, True):
        path = locate(target, inside=inside)
        for candidate in (path, *path.parent.glob(glob.escape(path.name) + "-*")):
            if os.path.lexists(candidate / journal.JOURNAL):
                return candidate
    return None


def owner_of(storage: LocalStorage, workspace: Path) -> Owner | None:
    """Return who owns a workspace, or None if there is none or it does not say."""
    match = _NAME.fullmatch(workspace.name)
    if match and match["owner"]:
        return Owner.parse(match["owner"])
    return _said_owner(storage, workspace)


def _said_owner(storage: LocalStorage, workspace: Path) -> Owner | None:
    try:
        return Owner.parse(json.loads(storage.read(workspace / "owner"))["owner"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def acquire(storage: LocalStorage, target: Path) -> Workspace:
    """Make the workspace for a directory, and remove what dead saves left there.

    Raises:
        CheckpointError: Another save into the directory is under way.
        OSError: The workspace cannot be made.
    """
    exists = os.path.isdir(target)
    if not (exists and is_mount_point(target)):
        try:
            return _acquire(storage, target, inside=False)
        except OSError as error:
            if error.errno not in _DENIED or not exists:
                raise
    return _acquire(storage, target, inside=True)


def _acquire(storage: LocalStorage, target: Path, *, inside: bool) -> Workspace:
    owner = Owner.of_this_process()
    path = locate(target, inside=inside)
    private = path.with_name(f"{path.name}-{owner}")
    _alive_here.add(owner.nonce)
    try:
        storage.make_directory(private)
        storage.make_directory(private / journal.STAGE)
        said = {"owner": str(owner), "host": socket.gethostname(), "since": time.strftime("%F %T %z")}
        write_small(storage, private / "owner", json.dumps(said).encode(), sync=False)
        with _alone(storage, path.parent):
            sweep(storage, path.parent, os.stat(private), target)
            if not inside and os.path.isdir(target):
                sweep(storage, target, os.stat(private), target)
            _take_name(storage, private, path, target)
    except BaseException:
        _alive_here.discard(owner.nonce)
        with contextlib.suppress(OSError):
            remove_tree(storage, private)
            if owner_of(storage, path) == owner:
                _remove(storage, path, owner)
        raise
    return Workspace(path, owner, inside)


@contextlib.contextmanager
def _alone(storage: LocalStorage, folder: Path) -> Iterator[None]:
    """Keep other saves from taking names in a directory, so that what is found dead cannot come to life."""
    held = storage.lock(folder)
    try:
        yield
    finally:
        if held is not None:
            storage.unlock(held)


def _take_name(storage: LocalStorage, private: Path, path: Path, target: Path) -> None:
    try:
        storage.rename(private, path)  # fails on a directory that is not empty, and a workspace never is
    except OSError as error:
        if error.errno not in OCCUPIED:
            raise
        raise CheckpointError(_busy(storage, path, target)) from None


def _busy(storage: LocalStorage, path: Path, target: Path) -> str:
    try:
        said = json.loads(storage.read(path / "owner"))
        who = f"process {Owner.parse(said['owner']).pid} on {said['host']} since {said['since']}"  # type: ignore[union-attr]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        who = "an unknown process"
    return (
        f"another save into {target} is under way ({who}): wait for it; "
        f"if you know that it is dead, remove {path} and save again"
    )


def sweep(storage: LocalStorage, folder: Path, own: os.stat_result, target: Path) -> None:
    """Remove the workspaces of dead saves from a directory, after finishing what they had begun to publish.

    Args:
        storage: The file system.
        folder: Where to look; links are not followed.
        own: Of a workspace made there just now. Its time tells the clock of that file system; what belongs to
            another user is left alone, as its journal would be obeyed with our rights.
        target: The directory that is to be saved to.

    Raises:
        CheckpointError: What was begun to be published there cannot be finished. Later it might be, over what
            is saved now, so nothing must be.
    """
    for entry in storage.list(folder):
        if is_workspace(entry.name):
            try:
                _sweep_one(storage, entry, own)
            except FileNotFoundError:  # another save was faster, or it was no dead one
                continue
            except (OSError, CheckpointError) as error:
                if unfinished(target) is not None:
                    raise CheckpointError(
                        f"an earlier save into {target} died while it was published, and cannot be finished: "
                        f"{error}; mend that, or remove {unfinished(target)}, which holds what is left of it"
                    ) from error
                logger.warning("%s, left by a save that died, cannot be removed: %s", entry.path, error)


def _sweep_one(storage: LocalStorage, entry: os.DirEntry[str], own: os.stat_result) -> None:
    if not entry.is_dir(follow_symlinks=False) or entry.stat(follow_symlinks=False).st_uid != own.st_uid:
        return
    path = Path(entry.path)
    owner = owner_of(storage, path)
    if owner is not None and _is_over(storage, path, owner, own.st_mtime):
        logger.info("removing %s, left by a save that died", path)
        _remove(storage, path, owner)


def _is_over(storage: LocalStorage, path: Path, owner: Owner, now: float) -> bool:
    dead = owner.is_dead()
    if dead is not None:
        return dead
    # Both times are of the file system's own clock, so it does not matter how the machines' clocks differ.
    times = [entry.stat(follow_symlinks=False).st_mtime for _, entry in walk(storage, path)]
    return now - max([os.stat(path).st_mtime, *times]) > ABANDONED_AFTER


def _remove(storage: LocalStorage, path: Path, owner: Owner) -> None:
    """Take a workspace of an owner out of use, finish what it had begun to publish, and remove it."""
    match = _NAME.fullmatch(path.name)
    private = path
    if match and not match["owner"]:
        private = path.with_name(f"{path.name}-{owner}")
        storage.rename(path, private)
        if _said_owner(storage, private) != owner:
            storage.rename(private, path)  # in between another save has removed the dead one and begun
            return
    journal.finish(storage, private)
    remove_tree(storage, private)


def release(storage: LocalStorage, workspace: Workspace) -> None:
    """Remove a workspace of this save; what resists is left to the next save."""
    try:
        _remove(storage, workspace.path, workspace.owner)
    except (OSError, CheckpointError) as error:
        logger.warning("%s cannot be removed, the next save will try again: %s", workspace.path, error)
    finally:
        _alive_here.discard(workspace.owner.nonce)
