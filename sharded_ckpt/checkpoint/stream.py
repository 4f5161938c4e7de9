"""The bytes of one file on their way from tensors to the disk."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from sharded_ckpt.checkpoint.pieces import CHUNK_BYTES, Aligned, InPlace
from sharded_ckpt.checkpoint.storage import LocalStorage

if TYPE_CHECKING:
    import torch

THREADS: Final = 2
"""One copies while the other one waits for the disk, prepares or hashes: more gain nothing."""

DIRECT_THREADS: Final = 3
"""Past the page cache, the disk shall have a second write waiting while the third one is copied."""


class ByteStream:
    """Writes a header and tensors, one after the other, to a file.

    The bytes are taken in file order under a lock, and written outside of it by several threads.

    Args:
        storage: What writes.
        fd: The file.
        header: The first bytes.
        tensors: What follows; iterated once, under the lock.
        hasher: Told all bytes in file order, if given.

    Attributes:
        nbytes: How many bytes were taken so far.
    """

    def __init__(
        self,
        storage: LocalStorage,
        fd: int,
        header: bytes,
        tensors: Iterable[torch.Tensor],
        hasher: hashlib._Hash | None = None,
    ) -> None:
        self._storage, self._fd, self._hasher = storage, fd, hasher
        self._header, self._tensors = header, tensors
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.nbytes = 0

    def write(self, nbytes: int) -> None:
        """Write everything.

        Args:
            nbytes: How much that will be, which decides whether threads, and a way past the page cache, are
                worth it.
        """
        is_large = nbytes > CHUNK_BYTES
        # What must be on the disk at the end need not fill the page cache: finding pages for it can take
        # longer than writing does, and evicts what is in use.
        is_direct = is_large and self._storage.durable and self._storage.bypass_cache(self._fd)
        self._source: Any = InPlace(self._header, self._tensors)
        if is_direct:
            self._source = Aligned(self._header, self._tensors, self._storage.let_go)
        if not is_large:
            self._work()
            return
        threads = DIRECT_THREADS if is_direct else THREADS
        with ThreadPoolExecutor(threads, thread_name_prefix="write-tensors") as pool:
            try:
                for done in [pool.submit(self._work) for _ in range(threads)]:
                    done.result()
            finally:
                self._stop.set()

    def _work(self) -> None:
        memory = self._source.memory()
        try:
            while (taken := self._take(memory)) is not None:
                offset, buffers = taken
                self._storage.write(self._fd, buffers, offset)
                self._storage.start_writeback(self._fd, offset, sum(map(len, buffers)))
                self._storage.let_go(buffers)
        finally:  # by an error, or because nothing is left for any thread
            self._stop.set()

    def _take(self, memory: Any) -> tuple[int, list[memoryview]] | None:
        with self._lock:
            buffers = [] if self._stop.is_set() else self._source.take(memory)
            if not buffers:
                return None
            if self._hasher:
                for buffer in buffers:
                    self._hasher.update(buffer)
            offset = self.nbytes
            self.nbytes += sum(map(len, buffers))
            return offset, buffers
