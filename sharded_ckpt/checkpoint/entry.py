"""One tensor as a safetensors header describes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

UINT64_MAX = 2**64 - 1

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits of one element, by the names that safetensors gives the dtypes."""


class TensorEntry(NamedTuple):
    """One tensor of a file.

    Example:
        >>> TensorEntry("BF16", (2, 3), 96, 108).nbytes
        12
    """

    dtype: str
    """The name that safetensors gives the dtype, such as `BF16`."""
    shape: tuple[int, ...]
    begin: int
    """Offset of the first byte, from the begin of the file."""
    end: int
    """Offset after the last byte, from the begin of the file."""

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor takes in the file."""
        return self.end - self.begin


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return how many bytes a tensor takes, computed in 64 bits as safetensors does.

    Raises:
        KeyError: The dtype is unknown.
        ValueError: The size overflows 64 bits, or ends inside a byte.

    Example:
        >>> nbytes_of("BF16", (2, 3)), nbytes_of("F4", (2, 3))
        (12, 3)
    """
    bits = 1
    for size in (*shape, DTYPE_BITS[dtype]):
        bits *= size
        if bits > UINT64_MAX:
            raise ValueError(f"shape {list(shape)!s:.80} overflows 64 bits")
    if bits % 8:
        raise ValueError(f"shape {list(shape)!s:.80} of {dtype} ends inside a byte")
    return bits // 8


def shorten(name: str, limit: int = 200) -> str:
    """Return a tensor name as it can stand in one line of an error.

    Example:
        >>> print(shorten("model.norm.weight"), shorten("a b"), shorten("x" * 300, limit=5))
        model.norm.weight 'a b' xxxxx...
    """
    name = name if len(name) <= limit else name[:limit] + "..."
    return name if name.isprintable() and name and " " not in name else repr(name)
