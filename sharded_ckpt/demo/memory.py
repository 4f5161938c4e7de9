"""How much memory this process has at most, in bytes of its resident set."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Return the largest resident set since `forget_peak_memory`, in bytes.

    Where there is no Linux /proc, it is the largest since the process began.

    Example:
        >>> peak_memory() > 2**20
        True
    """
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_memory() -> None:
    """Start again from what the process has now. See `man 5 proc`, `/proc/pid/clear_refs`."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
