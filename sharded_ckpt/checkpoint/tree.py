"""Small things done with files and directories, through a `LocalStorage`."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Final

from sharded_ckpt.checkpoint.storage import OCCUPIED, LocalStorage, PathLike

_COPY_BYTES: Final = 8 << 20


def write_small(storage: LocalStorage, path: PathLike, data: bytes, *, sync: bool = True) -> None:
    """Write a new file from bytes in memory."""
    fd = storage.create(path)
    try:
        storage.write(fd, [data], 0)
        if sync:
            storage.sync(fd)
    finally:
        storage.close(fd)


def copy_file(storage: LocalStorage, source: PathLike, target: PathLike) -> None:
    """Copy the content and the mode of a file to a new file."""
    with open(source, "rb") as file:
        fd = storage.create(target)
        try:
            offset = 0
            while chunk := file.read(_COPY_BYTES):
                storage.write(fd, [chunk], offset)
                offset += len(chunk)
            storage.sync(fd)
        finally:
            storage.close(fd)
    storage.copy_mode(source, target)


def remove_tree(storage: LocalStorage, root: PathLike) -> None:
    """Remove a directory and what is in it.

    Links are removed, never followed, nor is one in the place of the directory; what is gone is gone; what is
    mounted there is not entered.

    Raises:
        OSError: Something is left.
    """
    if os.path.islink(root):
        unlink_if_there(storage, root)
        return
    mounts = _mount_points()

    def remove(path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            for entry in storage.list(path):
                if entry.is_dir(follow_symlinks=False) and entry.path not in mounts:
                    remove(entry.path)
                else:
                    unlink_if_there(storage, entry.path)
            storage.remove_directory(path)

    remove(os.path.realpath(root))


def walk(storage: LocalStorage, root: PathLike) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield what a directory holds, by its path from there with `/`.

    These are files, links, and of the directories those that are empty, or not entered because something is
    mounted there.
    """
    mounts = _mount_points()

    def enter(path: str, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        for entry in storage.list(path):
            name, empty = prefix + entry.name, True
            if entry.is_dir(follow_symlinks=False) and entry.path not in mounts:
                for item in enter(entry.path, name + "/"):
                    empty = False
                    yield item
            if empty:
                yield name, entry

    return enter(os.path.realpath(root), "")


def make_parents(storage: LocalStorage, root: PathLike, name: str) -> None:
    """Make the directories between a directory and a name in it that may contain `/`."""
    folder = os.path.dirname(name)
    if not folder or os.path.isdir(os.path.join(root, folder)):
        return
    make_parents(storage, root, folder)
    with contextlib.suppress(FileExistsError):  # another rank was faster
        storage.make_directory(os.path.join(root, folder))


def remove_empty_parents(storage: LocalStorage, root: PathLike, name: str) -> None:
    """Remove the directories between a directory and a name in it, as far as nothing is left in them."""
    while name := os.path.dirname(name):
        try:
            storage.remove_directory(os.path.join(root, name))
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
            return


def is_mount_point(path: PathLike) -> bool:
    """Return whether something is mounted there, a directory of the same file system included."""
    return os.path.ismount(path) or os.path.realpath(path) in _mount_points()


def _mount_points() -> set[str]:
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            points = [line.split(" ")[4] for line in lines]
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point) for point in points}


def unlink_if_there(storage: LocalStorage, path: PathLike) -> None:
    """Remove a name of a file unless it is gone already."""
    try:
        storage.unlink(path)
    except FileNotFoundError:
        return
