"""The private place beside a directory where a save is prepared, and what dead saves left in such places.

`.NAME.saving` beside (or, where that is not possible, inside) the directory NAME belongs to one save at a
time: to the process that put it there. It holds `owner`, which says what process that is, and `new/`, the
stage. While it is made and while it is removed it is called `.NAME.saving-OWNER`, so that it is known at any
moment whose it is. Of a NAME that is too long for that, the begin and a digest stand there.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint import journal
from sharded_ckpt.checkpoint.owner import Owner
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
    owner.begin()
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
        owner.end()
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
        workspace.owner.end()
