"""Host memory that tensors are copied into before a save in the background, kept from save to save."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor

from sharded_ckpt.checkpoint.host_memory import host_buffer

_ALIGNMENT = 64  # bytes; enough for every dtype, and a line of the cache


class HostBuffers:
    """One piece of host memory for all tensors of a save; only a larger save makes it anew.

    Pages are touched once, by the first save, so that later ones cost a copy and nothing else. Memory for an
    accelerator's tensors is pinned.

    Args:
        shared: Whether another process may map it, by `fd`.

    Attributes:
        fd: The file that the memory is, if shared; None before there is any.
        allocations: How often memory was allocated.

    Example:
        >>> buffers = HostBuffers()
        >>> weight = torch.ones(2, 3)
        >>> copy = buffers.copy({"model": {"weight": weight}})["model"]["weight"]
        >>> weight.zero_().sum().item(), copy.sum().item(), buffers.allocations
        (0.0, 6.0, 1)
    """

    def __init__(self, *, shared: bool = False) -> None:
        self.shared, self.allocations = shared, 0
        self.fd: int | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self._memory.numel()

    def copy(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return copies of tensors; those of the call before are overwritten.

        Args:
            groups: Dense tensors of any device, by group and name.
        """
        places: dict[tuple[str, str], int] = {}
        end = 0
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                places[group, name] = end
                end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._reserve(end)
        copies = {
            group: {name: self._copy(tensor, places[group, name]) for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return copies

    def offset_of(self, tensor: Tensor) -> int:
        """Return at which byte of the memory one of the copies begins."""
        return tensor.data_ptr() - self._memory.data_ptr() if tensor.numel() else 0

    def release(self) -> None:
        """Give the memory back; copies that somebody holds keep it alive."""
        self._memory = torch.empty(0, dtype=torch.uint8)
        if self.fd is not None:
            os.close(self.fd)
        self.fd = None

    def _reserve(self, nbytes: int) -> None:
        if nbytes <= self.nbytes:
            return
        self.release()
        self.allocations += 1
        if self.shared:
            self.fd = fd = _anonymous_file(nbytes)
            self._memory = torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)
        else:
            device = torch.accelerator.current_accelerator() or torch.device("cpu")
            self._memory = host_buffer(nbytes, device)

    def _copy(self, tensor: Tensor, begin: int) -> Tensor:
        copy = self._memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copy.copy_(tensor.detach(), non_blocking=True)
        return copy


def _anonymous_file(nbytes: int) -> int:
    """Return the descriptor of a file of that size which has no name and lies in memory where possible."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("sharded_ckpt", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, nbytes)
    return fd
