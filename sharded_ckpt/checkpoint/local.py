"""A checkpoint in a local directory."""

from __future__ import annotations

import difflib
import os
import re
import stat
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

from patchers.errors import CheckpointError, CheckpointNotFoundError, ConfigError

Identity: TypeAlias = "tuple[int, int, int, int]"
"""Device, inode, size and time of change of a file: another file, or other content, has another one."""

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

_FILE_URL = re.compile(r"file:(?=/)(?://(?:localhost(?=/))?)?")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash is what `Path` leaves of two


def user_path(location: str | os.PathLike[str]) -> Path:
    """Return the local path that a user means: `~` is the home directory, `file://` begins a URL of a file.

    Raises:
        ConfigError: It is empty, or the URL of something that is not a local file.

    Example:
        >>> user_path("file:///models/a%20b").as_posix(), user_path("runs/a").as_posix()
        ('/models/a b', 'runs/a')
    """
    text = os.fspath(location)
    if not text.strip():
        raise ConfigError(f"{text!r} is no path; '.' is the working directory")
    if url := _FILE_URL.match(text):
        return Path(unquote(text[url.end() :]))
    if _URL.match(text):
        raise ConfigError(
            f"{text}: expected a local path, found a URL; what is saved goes to a local directory (upload "
            "that), and URLs are read where they are given as text, not as a Path"
        )
    return Path(text).expanduser()


def identity_of(status: os.stat_result) -> Identity:
    """Return what tells a file from another one, and from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle: opening it says so
        return False


def similar(path: Path) -> str:
    """Return a hint at a file beside the missing one whose name is close, or at the part that exists."""
    parent = path.parent
    if not parent.is_dir():
        return f"; {parent} does not exist either"
    close = difflib.get_close_matches(path.name, [entry.name for entry in os.scandir(parent)], n=3)
    return f"; did you mean {' or '.join(str(parent / name) for name in close)}?" if close else ""


class LocalSource:
    """The files of one directory, which stays the same one even if another takes its name meanwhile.

    The directory is opened once and every name is looked up in what was opened, so a save that exchanges two
    directories cannot make us read an index of one and shards of the other.
    """

    def __init__(self, directory: str | os.PathLike[str], entry: str | None = None) -> None:
        self.location = str(directory)
        self._entry = entry
        self._seen: dict[str, Identity] = {}
        path = user_path(directory)
        try:
            self.directory = path.absolute()  # others look there by path, after a chdir too
            self._fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"{self.location}: no such directory") from None
        except OSError as error:
            raise CheckpointError(f"{self.location}: cannot be opened: {error.strerror}") from error
        self._close = weakref.finalize(self, os.close, self._fd)

    @property
    def entry(self) -> str | None:
        """The one file that was asked for, or None for the whole directory."""
        return self._entry

    def names(self) -> list[str]:
        """Return the files at the top, sorted."""
        with os.scandir(self._fd) as entries:
            return sorted(entry.name for entry in entries if not _is_directory(entry))

    def exists(self, name: str) -> bool:
        """Return whether there is anything of that name, a broken link too: opening it says what is wrong."""
        try:
            os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise self._unreadable(name, error) from error
        return True

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the files that do not exist."""
        return [name for name in names if not self.exists(name)]

    def size(self, name: str) -> int:
        """Return how many bytes a file has."""
        return self._stat(name).st_size

    def read_bytes(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Return the bytes of a file from `begin` to `end` (exclusive), fewer if the file ends before."""
        fd = self.open(name)
        try:
            status = os.fstat(fd)
            self._seen[name] = identity_of(status)
            end = status.st_size if end is None else min(end, status.st_size)
            chunks = []
            while begin < end and (chunk := os.pread(fd, end - begin, begin)):
                chunks.append(chunk)
                begin += len(chunk)
            return b"".join(chunks)
        except OSError as error:
            raise self._unreadable(name, error) from error
        finally:
            os.close(fd)

    def ensure(self, names: Iterable[str]) -> None:
        """Do nothing: the files are here."""

    def local_path(self, name: str) -> Path:
        """Return the path of an existing file."""
        self._stat(name)
        return self.directory / name

    def is_here(self, name: str) -> bool:
        """Return True: all files are."""
        return True

    def open(self, name: str) -> int:
        """Return a new file descriptor of a regular file; links are followed, the hub's cache has them."""
        self._stat(name)
        try:
            # Non-blocking, so that a FIFO that takes the name just now cannot hang us.
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._fd)
        except OSError as error:
            raise self._unreadable(name, error) from error

    def changed(self) -> bool:
        """Return whether the directory at this path, or a file read from it, is another one now."""
        try:
            now, then = os.stat(self.directory), os.fstat(self._fd)
            if (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino):
                return True
            return any(
                identity_of(os.stat(name, dir_fd=self._fd)) != seen for name, seen in self._seen.items()
            )
        except OSError:
            return True

    def close(self) -> None:
        """Close the directory; what was opened in it stays open."""
        self._close()

    def _stat(self, name: str) -> os.stat_result:
        try:
            status = os.stat(name, dir_fd=self._fd)
        except OSError as error:
            raise self._unreadable(name, error) from error
        if not stat.S_ISREG(status.st_mode):
            kind = next((kind for test, kind in _KINDS if test(status.st_mode)), "something else")
            raise CheckpointError(f"{self.location}/{name}: expected a regular file, found {kind}")
        return status

    def _unreadable(self, name: str, error: OSError) -> CheckpointError:
        path = f"{self.location}/{name}"
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            try:
                target = os.readlink(name, dir_fd=self._fd)
            except OSError:
                return CheckpointNotFoundError(f"{path}: no such file")
            return CheckpointNotFoundError(f"{path}: a symbolic link to {target}, which does not exist")
        return CheckpointError(f"{path}: cannot be read: {error.strerror}")
