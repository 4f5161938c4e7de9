"""Tensors as bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def bytes_of(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as bytes, which keep every bit, whatever its dtype.

    Example:
        >>> import torch
        >>> bytes_of(torch.tensor([1, -1], dtype=torch.int16))
        tensor([  1,   0, 255, 255], dtype=torch.uint8)
    """
    import torch

    flat = tensor.reshape(-1)
    # a tensor of one element counts as contiguous with any stride
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)
