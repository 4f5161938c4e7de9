"""Host memory that devices copy from and into: pinned, where that can be had."""

from __future__ import annotations

import functools
import logging

import torch

logger = logging.getLogger(__name__)


def host_buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return a buffer of bytes on the host for copies from or to a device.

    It is pinned if the device is an accelerator. Not every accelerator, nor every machine, lets memory be
    pinned: then copies are right, but slower, which is said once.

    Args:
        nbytes: Its size.
        device: The other side; of the CPU itself the memory is ordinary.
    """
    accelerator = torch.accelerator.current_accelerator()
    pinned = accelerator is not None and device.type == accelerator.type
    return pinned_buffer(nbytes) if pinned else torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def pinned_buffer(nbytes: int) -> torch.Tensor:
    """Return a buffer of bytes that is pinned, or else an ordinary one, and say so."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:  # torch has no narrower one, neither for "not here" nor for "no more"
        _say_once(str(error).partition("\n")[0])
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


@functools.cache
def _say_once(why: str) -> None:
    logger.warning("host memory cannot be pinned, so copies from and to devices are slower: %s", why)
