"""The bytes of one file on their way from tensors to the disk."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeAlias

from sharded_ckpt.checkpoint.raw import bytes_of
from sharded_ckpt.checkpoint.storage import LocalStorage

if TYPE_CHECKING:
    import torch

CHUNK_BYTES: Final = 8 << 20
"""Most bytes of one write call."""

STAGING_BYTES: Final = 4 << 20
"""Staging buffer of one thread, for tensors that are not contiguous in host memory."""

THREADS: Final = 2
"""One copies into the page cache while the other one prepares, hashes or waits: more gain nothing."""

_STAGING_ALIGNMENT = 16  # the largest item of any dtype
_MAX_PIECES = 1024  # IOV_MAX of Linux

Piece: TypeAlias = "memoryview | torch.Tensor"
"""Bytes that can be written from where they are, or a tensor that must be copied for that."""


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
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._batches = _batches(header, tensors)
        self.nbytes = 0

    def write(self, nbytes: int) -> None:
        """Write everything.

        Args:
            nbytes: How much that will be, which decides whether threads are worth it.
        """
        if nbytes <= CHUNK_BYTES:
            self._work()
            return
        with ThreadPoolExecutor(THREADS, thread_name_prefix="write-tensors") as pool:
            try:
                for done in [pool.submit(self._work) for _ in range(THREADS)]:
                    done.result()
            finally:
                self._stop.set()

    def _work(self) -> None:
        staging = _Staging()
        try:
            while (taken := self._take(staging)) is not None:
                offset, buffers = taken
                self._storage.write(self._fd, buffers, offset)
                self._storage.start_writeback(self._fd, offset, sum(map(len, buffers)))
        finally:  # by an error, or because nothing is left for any thread
            self._stop.set()

    def _take(self, staging: _Staging) -> tuple[int, list[memoryview]] | None:
        with self._lock:
            batch = None if self._stop.is_set() else next(self._batches, None)
            if batch is None:
                return None
            staging.clear()
            buffers = [piece if isinstance(piece, memoryview) else staging.copy(piece) for piece in batch]
            if self._hasher:
                for buffer in buffers:
                    self._hasher.update(buffer)
            offset = self.nbytes
            self.nbytes += sum(map(len, buffers))
            return offset, buffers


def _batches(header: bytes, tensors: Iterable[torch.Tensor]) -> Iterator[list[Piece]]:
    """Group the pieces of a file into writes: what is small goes together."""
    batch: list[Piece] = [memoryview(header)]
    total, staged = len(header), 0
    for tensor in tensors:
        for piece, nbytes in _pieces(tensor):
            copies = 0 if isinstance(piece, memoryview) else nbytes + _STAGING_ALIGNMENT
            if total + nbytes > CHUNK_BYTES or staged + copies > STAGING_BYTES or len(batch) == _MAX_PIECES:
                yield batch
                batch, total, staged = [], 0, 0
            batch.append(piece)
            total, staged = total + nbytes, staged + copies
    yield batch


def _pieces(tensor: torch.Tensor) -> Iterator[tuple[Piece, int]]:
    """Cut a tensor into runs of its row-major bytes: memory as it is where possible, else parts to copy."""
    if tensor.numel() == 0:
        return
    if tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        memory = bytes_of(tensor).numpy().data
        for begin in range(0, len(memory), CHUNK_BYTES):
            piece = memory[begin : begin + CHUNK_BYTES]
            yield piece, len(piece)
    else:
        for part in _parts(tensor, STAGING_BYTES - _STAGING_ALIGNMENT):
            yield part, part.nbytes


def _parts(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """Cut along the first dimension until no part is larger than the limit in bytes, in row-major order."""
    if tensor.nbytes <= limit:
        yield tensor
        return
    rows = limit // (tensor.nbytes // tensor.shape[0])
    for begin in range(0, tensor.shape[0], max(rows, 1)):
        yield from [tensor[begin : begin + rows]] if rows else _parts(tensor[begin], limit)


class _Staging:
    """Host memory of one thread that pieces of tensors are copied into on their way to the file."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._used = 0

    def clear(self) -> None:
        self._used = 0

    def copy(self, piece: torch.Tensor) -> memoryview:
        import torch

        if self._buffer is None:
            # Pinned memory is what devices copy into at full speed.
            pinned = piece.device.type != "cpu" and torch.accelerator.is_available()
            self._buffer = torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        taken = self._buffer[self._used : self._used + piece.nbytes]
        taken.view(piece.dtype).view(piece.shape).copy_(piece)
        self._used += -(-piece.nbytes // _STAGING_ALIGNMENT) * _STAGING_ALIGNMENT
        return taken.numpy().data
