"""Gate and up projections in one matrix: one after the other in files, or interleaved for a kernel."""

from __future__ import annotations

import torch

from patchers.errors import ConfigError


def _interleave_glu_tensor(tensor: torch.Tensor, interleave_size: int) -> torch.Tensor:
    """Return `[W, V]` as `[W[0:k], V[0:k], W[k:2k], …]` along the first dimension.

    Args:
        tensor: A weight `(2 * width, hidden)` or a bias `(2 * width,)`, gate first.
        interleave_size: How many rows stay together; it divides `width`.

    Raises:
        ConfigError: It does not.

    Example:
        >>> _interleave_glu_tensor(torch.arange(8), 2).tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    blocks = _blocks(tensor, interleave_size)
    return tensor.reshape(2, blocks, interleave_size, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _deinterleave_glu_tensor(tensor: torch.Tensor, interleave_size: int) -> torch.Tensor:
    """Undo `_interleave_glu_tensor`.

    Example:
        >>> _deinterleave_glu_tensor(torch.tensor([0, 1, 4, 5, 2, 3, 6, 7]), 2).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    blocks = _blocks(tensor, interleave_size)
    return tensor.reshape(blocks, 2, interleave_size, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _blocks(tensor: torch.Tensor, size: int) -> int:
    rows = tensor.shape[0] if tensor.dim() else 0
    if size < 1 or rows == 0 or rows % (2 * size):
        raise ConfigError(
            f"a gate and up projection of shape {tuple(tensor.shape)} has {rows / 2:g} rows each, which "
            f"{size} does not divide"
        )
    return rows // (2 * size)
