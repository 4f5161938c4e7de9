"""Bytes of files brought into the page cache before they are needed."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from sharded_ckpt.checkpoint.ranges import Range, cut


class ReadAhead:
    """Brings byte ranges of local files into the page cache in the background. A hint: it changes no result.

    One `MADV_WILLNEED` or `POSIX_FADV_WILLNEED` reads no more than the read-ahead window of the device, often
    128 KiB, however long its range is (`force_page_cache_ra` in the kernel's mm/readahead.c), and many small
    ones wait for the interpreter lock between each other. `sendfile` to the null device reads a long range in
    one call, without that lock and without a copy; what is in the cache already passes at 50 GB/s.

    Args:
        jobs: File descriptors, which are closed here when all is done, with their ranges.
        limit: Bytes after which to stop; half of the memory of the machine if not given.

    Attributes:
        pieces: How many pieces there are to read: what is in the page cache already is none.
    """

    _STEP = 8 * 2**20
    _THREADS = 4

    def __init__(self, jobs: Sequence[tuple[int, Sequence[Range]]], limit: int | None = None) -> None:
        self._limit = _half_of_memory() if limit is None else limit
        self._fds = [fd for fd, _ in jobs]
        self._null = _null_device()
        pieces = [
            (fd, piece)
            for fd, ranges in jobs
            for piece in cut(ranges, self._STEP)
            if self._null >= 0 and not _is_cached(fd, piece)
        ]
        self.pieces = len(pieces)
        self._pieces = iter(pieces)
        self._lock = threading.Lock()
        self._running = min(self._THREADS, self.pieces)
        self._threads = [
            threading.Thread(target=self._run, name=f"read-ahead-{number}", daemon=True)
            for number in range(self._running)
        ]
        for thread in self._threads:
            thread.start()
        if not self._threads:
            self._close()

    def cancel(self) -> None:
        """Stop after the pieces that are being read."""
        with self._lock:
            self._limit = 0

    def wait(self) -> None:
        """Return when all is read."""
        for thread in self._threads:
            thread.join()

    def _next(self) -> tuple[int, Range] | None:
        with self._lock:
            piece = next(self._pieces, None) if self._limit > 0 else None
            if piece is not None:
                self._limit -= piece[1][1] - piece[1][0]
            return piece

    def _run(self) -> None:
        try:
            while (piece := self._next()) is not None:
                fd, (begin, end) = piece
                while begin < end and (count := os.sendfile(self._null, fd, begin, end - begin)):
                    begin += count
        except OSError:  # not every system and file system can; the data will be read when they are used
            self.cancel()
        finally:
            self._finish()

    def _finish(self) -> None:
        with self._lock:
            self._running -= 1
            if self._running:
                return
        self._close()

    def _close(self) -> None:
        for fd in (*self._fds, self._null):
            if fd >= 0:
                os.close(fd)


def _null_device() -> int:
    """Open it; -1 with too many open files, which are no reason to fail for a hint."""
    try:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _is_cached(fd: int, piece: Range) -> bool:
    """Whether the first, the middle and the last byte are in the page cache: then the rest mostly is, too.

    Threads that find nothing to read cost more than a warm load itself, so it is worth asking.
    """
    begin, end = piece
    try:
        return all(
            os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
            for offset in (begin, (begin + end) // 2, end - 1)
        )
    except (OSError, AttributeError):  # not cached, or a system that cannot tell
        return False


def _half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
