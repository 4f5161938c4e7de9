"""The one place where files are written, linked, renamed and removed.

Every file operation of the writing side is a method of `LocalStorage`, named in `OPERATIONS`: what can fail,
by the names under which a test makes it fail. Nothing here knows what is written or why.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import time
from collections.abc import Sequence
from typing import Final, TypeAlias

PathLike: TypeAlias = "str | os.PathLike[str]"
Buffer: TypeAlias = "bytes | bytearray | memoryview"

OPERATIONS: Final = (
    "lock",
    "unlock",
    "list",
    "read",
    "make_directory",
    "remove_directory",
    "create",
    "reserve",
    "bypass_cache",
    "write",
    "start_writeback",
    "sync",
    "sync_file",
    "sync_directory",
    "close",
    "link",
    "symlink",
    "copy_mode",
    "rename",
    "exchange",
    "unlink",
)
"""The failure points: the methods of `LocalStorage` that touch the file system."""

UNSUPPORTED: Final = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EBUSY}
)
"""What a file system says when it cannot do a thing at all, or not with these two names."""

OCCUPIED: Final = frozenset({errno.ENOTEMPTY, errno.EEXIST})
"""What a file system says when a directory would have to be empty, and is not."""

LOCK_WITHIN: Final = 10.0
"""Seconds to wait for somebody who holds a lock; it is held for moments only, unless its owner is frozen."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_MAX_BUFFERS = 1024  # IOV_MAX of Linux
_LIBC = ctypes.CDLL(None, use_errno=True)


class LocalStorage:
    """The file system, as the writing side sees it.

    New files and directories get the mode of the umask. No method truncates a file or writes into one that
    another name shows, so a mapping of an old file stays valid.

    Args:
        durable: Whether data and names must survive a power cut; if not, nothing waits for the disk.
    """

    def __init__(self, *, durable: bool = True) -> None:
        self.durable = durable

    def lock(self, path: PathLike) -> int | None:
        """Keep others who lock the same directory out, for a moment; None where that is not possible.

        Returns:
            What `unlock` takes.
        """
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        limit = time.monotonic() + LOCK_WITHIN
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except OSError as error:
                if error.errno == errno.EWOULDBLOCK and time.monotonic() < limit:
                    time.sleep(0.005)
                    continue
                os.close(fd)
                return None

    def unlock(self, fd: int) -> None:
        """Let others in again."""
        try:
            fcntl.flock(fd, fcntl.LOCK_UN)  # a fork may have inherited the descriptor
        finally:
            os.close(fd)

    def list(self, path: PathLike) -> list[os.DirEntry[str]]:
        """Return the entries of a directory, sorted by name."""
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    def read(self, path: PathLike) -> bytes:
        """Return the content of a small file."""
        with open(path, "rb") as file:
            return file.read()

    def make_directory(self, path: PathLike) -> None:
        """Make a directory that does not exist yet."""
        os.mkdir(path)

    def remove_directory(self, path: PathLike) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    def create(self, path: PathLike) -> int:
        """Create a file that does not exist yet and return its descriptor."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def reserve(self, fd: int, nbytes: int) -> None:
        """Make room for a file where possible, so that a full disk shows before anything is written."""
        # os.posix_fallocate would write into every block where the file system cannot reserve.
        fallocate = getattr(_LIBC, "fallocate64", None) or getattr(_LIBC, "fallocate", None)
        if fallocate is None or nbytes == 0:
            return
        try:
            _check(fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)))
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise

    def bypass_cache(self, fd: int) -> bool:
        """Let the writes to a file go past the page cache from now on, if the file system can do that."""
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        except (AttributeError, OSError):  # no such flag on this system, or on this file system
            return False
        return True

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write buffers one after the other, the first one at an offset in bytes.

        What cannot go past the page cache, such as an end of a file that is no whole block, goes through it.
        """
        pending = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        through_cache = False
        while pending:
            try:
                written = os.pwritev(fd, pending[:_MAX_BUFFERS], offset)
            except OSError as error:
                if error.errno != errno.EINVAL or through_cache:
                    raise
                _use_cache(fd)
                through_cache = True
                continue
            offset += written
            while written:
                step = min(written, len(pending[0]))
                written -= step
                pending[0] = pending[0][step:]
                if not pending[0]:
                    del pending[0]

    def let_go(self, buffers: Sequence[Buffer]) -> None:
        """Be told of memory whose bytes have been written, or copied to be written; not needed again."""

    def start_writeback(self, fd: int, offset: int, nbytes: int) -> None:
        """Let the disk begin with a range that is complete, while more is copied into the page cache."""
        # Only a hint: whatever goes wrong with the data itself, `sync` reports.
        if self.durable and hasattr(_LIBC, "sync_file_range"):
            _LIBC.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)

    def sync(self, fd: int) -> None:
        """Wait until a file is on the disk."""
        if self.durable:
            os.fsync(fd)

    def sync_file(self, path: PathLike) -> None:
        """Wait until a file that others wrote is on the disk."""
        if self.durable:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def sync_directory(self, path: PathLike) -> None:
        """Wait until the names in a directory are on the disk."""
        if not self.durable:
            return
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in UNSUPPORTED:  # some network file systems sync names at once
                raise
        finally:
            os.close(fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def link(self, source: PathLike, target: PathLike) -> None:
        """Give a file, or a symbolic link itself, a second name."""
        os.link(source, target, follow_symlinks=False)

    def symlink(self, text: str, path: PathLike) -> None:
        """Create a symbolic link."""
        os.symlink(text, path)

    def copy_mode(self, source: PathLike, target: PathLike) -> None:
        """Give a file or directory the mode of another one."""
        os.chmod(target, os.stat(source).st_mode & 0o7777)

    def rename(self, source: PathLike, target: PathLike) -> None:
        """Rename; a file (or an empty directory) that has the new name is replaced atomically."""
        os.rename(source, target)

    def exchange(self, first: PathLike, second: PathLike) -> None:
        """Exchange two names atomically.

        Raises:
            OSError: With an errno of `UNSUPPORTED` where the kernel or the file system cannot.
        """
        if not hasattr(_LIBC, "renameat2"):
            raise OSError(errno.ENOSYS, "no renameat2", os.fspath(first), None, os.fspath(second))
        names = os.fsencode(first), os.fsencode(second)
        done = _LIBC.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
        _check(done, os.fspath(first), os.fspath(second))

    def unlink(self, path: PathLike) -> None:
        """Remove a name of a file, or a symbolic link."""
        os.unlink(path)


def _use_cache(fd: int) -> None:
    """Let the writes to a file go through the page cache again."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~getattr(os, "O_DIRECT", 0))


def _check(result: int, first: str | None = None, second: str | None = None) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), first, None, second)
