"""Memory that large tensors take for as long as they are needed, and not longer."""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence

import numpy as np
import torch

from sharded_ckpt.checkpoint.storage import Buffer, LocalStorage

_SMALL_BYTES = 2**16
_FAULT_AROUND = 2**16  # bytes on both sides of a page that Linux maps along with it, what was let go included


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor whose memory goes back to the system when it goes; its values are undefined.

    What `malloc` is given back it keeps for later, in arenas of each thread; with large buffers of many sizes
    that adds up to several times what is in use.

    Example:
        >>> allocate((2, 3), torch.bfloat16).shape
        torch.Size([2, 3])
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _SMALL_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(shape)


class MappedStorage(LocalStorage):
    """The local file system, which lets go of the pages of a mapping as soon as they are written.

    The pages of a mapped file count as memory of the process from the first look at them until the mapping
    goes. A tensor is mapped as a whole, and an embedding may be larger than all that is in memory besides.
    """

    def __init__(self, *, durable: bool = True) -> None:
        super().__init__(durable=durable)
        self._mappings: list[weakref.ref[mmap.mmap]] = []

    def adopt(self, mapping: mmap.mmap) -> None:
        """Let go of the pages of this mapping when they are written.

        Args:
            mapping: A private mapping of a file, which nobody changes: what is let go can be read again.
        """
        self._mappings = [known for known in self._mappings if known() is not None] + [weakref.ref(mapping)]

    def let_go(self, buffers: Sequence[Buffer]) -> None:
        """Drop the pages of what has been written, or copied to be written."""
        for known in self._mappings:
            mapping = known()
            if mapping is not None:
                _drop_pages(mapping, buffers)


def _drop_pages(mapping: mmap.mmap, buffers: Sequence[Buffer]) -> None:
    """Drop the whole pages of a mapping that lie in any of the buffers, and those that came with them."""
    base = _address(mapping)
    for buffer in buffers:
        begin = _address(buffer) - base if len(buffer) else -1
        if 0 <= begin < len(mapping):
            first = max(0, begin - _FAULT_AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
            last = (begin + len(buffer)) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def _address(buffer: Buffer | mmap.mmap) -> int:
    return int(np.frombuffer(buffer, dtype=np.uint8).__array_interface__["data"][0])
