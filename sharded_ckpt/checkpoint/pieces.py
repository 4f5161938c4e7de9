"""The bytes of a file, cut into writes."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from sharded_ckpt.checkpoint.raw import bytes_of

if TYPE_CHECKING:
    import torch

CHUNK_BYTES: Final = 8 << 20
"""Most bytes of one write call, from where they are."""

DIRECT_BYTES: Final = 3 << 20
"""Bytes of one write call past the page cache: a multiple of every page size."""

STAGING_BYTES: Final = 4 << 20
"""Staging buffer for tensors that are not contiguous in host memory."""

_STAGING_ALIGNMENT = 16  # the largest item of any dtype
_MAX_PIECES = 1024  # IOV_MAX of Linux

Piece: TypeAlias = "memoryview | torch.Tensor"
"""Bytes that can be written from where they are, or a tensor that must be copied for that."""


class InPlace:
    """Cuts the bytes into writes from where they are; what is small goes together.

    Args:
        header: The first bytes.
        tensors: What follows; iterated once.
    """

    def __init__(self, header: bytes, tensors: Iterable[torch.Tensor]) -> None:
        self._batches = _batches(header, tensors)

    def memory(self) -> Staging:
        """Return what one thread needs to hold a write."""
        return Staging()

    def take(self, memory: Staging) -> list[memoryview]:
        """Return the next write, valid until the memory is used again; nothing at the end."""
        memory.clear()
        return [
            piece if isinstance(piece, memoryview) else memory.copy(piece)
            for piece in next(self._batches, ())
        ]


class Aligned:
    """Copies the bytes into writes of one size in page-aligned memory, as the disk takes them by itself.

    Args:
        header: The first bytes.
        tensors: What follows; iterated once.
        copied: Told of the memory that has been copied.
    """

    def __init__(
        self,
        header: bytes,
        tensors: Iterable[torch.Tensor],
        copied: Callable[[Sequence[memoryview]], None],
    ) -> None:
        self._bytes, self._copied = _in_host_memory(header, tensors), copied
        self._rest = memoryview(b"")

    def memory(self) -> memoryview:
        """Return what one thread needs to hold a write."""
        return memoryview(mmap.mmap(-1, DIRECT_BYTES))

    def take(self, memory: memoryview) -> list[memoryview]:
        """Return the next write, valid until the memory is used again; nothing at the end."""
        filled = 0
        while filled < len(memory) and self._more():
            part = self._rest[: len(memory) - filled]
            memory[filled : filled + len(part)] = part
            self._copied([part])
            filled, self._rest = filled + len(part), self._rest[len(part) :]
        return [memory[:filled]] if filled else []

    def _more(self) -> bool:
        if not len(self._rest):
            self._rest = next(self._bytes, self._rest)
        return len(self._rest) > 0


class Staging:
    """Host memory that pieces of tensors are copied into on their way to the file."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._used = 0

    def clear(self) -> None:
        """Use it anew."""
        self._used = 0

    def copy(self, piece: torch.Tensor) -> memoryview:
        """Return the bytes of a tensor, at a place of their own."""
        from sharded_ckpt.checkpoint.host_memory import host_buffer

        if self._buffer is None:
            self._buffer = host_buffer(STAGING_BYTES, piece.device)
        taken = self._buffer[self._used : self._used + piece.nbytes]
        taken.view(piece.dtype).view(piece.shape).copy_(piece)
        self._used += -(-piece.nbytes // _STAGING_ALIGNMENT) * _STAGING_ALIGNMENT
        return taken.numpy().data


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


def _in_host_memory(header: bytes, tensors: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    """Yield all bytes in file order, none empty; each is valid until the next one is asked for."""
    yield memoryview(header)
    staging = Staging()
    for tensor in tensors:
        for piece, _ in _pieces(tensor):
            staging.clear()
            yield piece if isinstance(piece, memoryview) else staging.copy(piece)


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
