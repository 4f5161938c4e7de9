"""One safetensors file of a checkpoint, opened: its header, its bytes by range, its mapping."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TypeAlias

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.header import Header, read_header
from sharded_ckpt.checkpoint.local import Identity, identity_of
from sharded_ckpt.checkpoint.source import TensorSource
from sharded_ckpt.checkpoint.windows import Items

Progress: TypeAlias = Callable[[int], object]
"""Called with the number of bytes of the checkpoint that were read since the last call."""

PAGE = mmap.ALLOCATIONGRANULARITY


class Shard:
    """One safetensors file, opened once: what is read later is of the same file as the header.

    Args:
        source: The checkpoint.
        name: The file in it.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: It cannot be read, or is no sound safetensors file.
    """

    def __init__(self, source: TensorSource, name: str) -> None:
        self.source = source
        self.name = name
        self.file = f"{source.location}/{name}"
        self._fd = -1
        self._close: weakref.finalize[[int], Shard] | None = None
        self._identity: Identity | None = None
        self._size: int | None = None
        if self.attach():
            self.header: Header = read_header(self._pread, os.fstat(self._fd).st_size, self.file)
        else:
            self.header = read_header(self._fetch, source.size(name), self.file)
        self._size = self.header.file_size

    def attach(self) -> bool:
        """Open the file if it is on this machine, and return whether it is.

        Raises:
            CheckpointError: Another file has taken its place since the header was read, or it was changed.
        """
        if self._close is None or not self._close.alive:
            fd = self.source.open(self.name)
            if fd is None:
                return False
            self._fd, self._close = fd, weakref.finalize(self, os.close, fd)
        status = os.fstat(self._fd)
        identity = identity_of(status)
        self._identity = self._identity or identity
        if identity != self._identity or self._size not in (None, status.st_size):
            raise CheckpointError(f"{self.file}: the file was changed while it was read; load again")
        return True

    def close(self) -> None:
        """Close the file; it is opened again if it is needed, and must be the same one then."""
        if self._close is not None:
            self._close()

    def fileno(self) -> int:
        """Return the file descriptor of a file on this machine.

        Raises:
            CheckpointError: It is not on this machine, or not what it was when its header was read.
        """
        if not self.attach():
            raise CheckpointError(f"{self.file}: not on this machine")
        return self._fd

    def map(self, begin: int = 0, end: int | None = None) -> tuple[mmap.mmap, int]:
        """Map a range of the file, private and writable: changes stay in this process.

        Returns:
            The mapping, and the offset in it at which `begin` lies.
        """
        fd = self.fileno()
        base = begin // PAGE * PAGE
        length = (self.header.file_size if end is None else end) - base
        flags = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        try:
            mapping = mmap.mmap(
                fd,
                length,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=base,
                **flags,
            )
        except OSError as error:
            hint = "; raise the limit with `ulimit -n`" if error.errno == errno.EMFILE else ""
            raise CheckpointError(f"{self.file}: cannot be mapped: {error.strerror}{hint}") from error
        return mapping, begin - base

    def readinto(self, buffers: list[memoryview], offset: int) -> None:
        """Fill buffers, one after the other, with the bytes from an offset on.

        Raises:
            CheckpointError: The file ends before, or cannot be read.
        """
        buffers = [buffer for buffer in buffers if len(buffer)]
        while buffers:
            count = self._read_some(buffers, offset)
            if count == 0:
                raise CheckpointError(f"{self.file}: the file shrank while it was read; load again")
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                buffers[0] = buffers[0][count:]

    def _read_some(self, buffers: list[memoryview], offset: int) -> int:
        try:
            if self._close is not None and self._close.alive:
                return os.preadv(self._fd, buffers, offset)
            chunk = self._fetch(offset, offset + len(buffers[0]))
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be read: {error}") from error
        buffers[0][: len(chunk)] = chunk
        return len(chunk)

    def _pread(self, begin: int, end: int) -> bytes:
        return os.pread(self._fd, end - begin, begin)

    def _fetch(self, begin: int, end: int) -> bytes:
        return self.source.read_bytes(self.name, begin, end)


Plan: TypeAlias = Sequence[tuple[Shard, Items]]
"""Files with the tensors wanted of each, in file order."""
