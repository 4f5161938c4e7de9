"""Bytes of a file as torch tensors."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeAlias

import torch

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt.checkpoint.entry import TensorEntry, shorten
from sharded_ckpt.checkpoint.windows import Item, Items

DtypeRule: TypeAlias = "torch.dtype | Callable[[str, torch.dtype], torch.dtype] | None"

_TORCH_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}


@cache
def torch_dtype(name: str) -> torch.dtype | None:
    """Return the torch dtype of a safetensors dtype, None if this torch has none.

    Example:
        >>> torch_dtype("BF16"), torch_dtype("F6_E2M3")
        (torch.bfloat16, None)
    """
    return getattr(torch, _TORCH_NAMES.get(name, ""), None)


def dtype_of(key: str, entry: TensorEntry, file: str) -> torch.dtype:
    """Return the torch dtype of a tensor of a file.

    Raises:
        CheckpointError: This torch has no such dtype, or cannot give it that shape.
    """
    if entry.dtype == "F4" and entry.shape and entry.shape[-1] % 2:
        raise CheckpointError(
            f"{file}: tensor {shorten(key)} has rows of {entry.shape[-1]} 4-bit elements; torch packs two "
            "into a byte and needs an even number: store it as bytes (U8)"
        )
    dtype = torch_dtype(entry.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{file}: tensor {shorten(key)} has dtype {entry.dtype}, which torch {torch.__version__} lacks"
        )
    return dtype


def shape_of(entry: TensorEntry) -> tuple[int, ...]:
    """Return the shape that torch gives the tensor: it counts pairs of 4-bit elements, the file elements."""
    if entry.dtype == "F4" and entry.shape:
        return (*entry.shape[:-1], entry.shape[-1] // 2)
    return entry.shape


def view_tensors(
    buffer: mmap.mmap | memoryview, items: Iterable[tuple[str, TensorEntry]], file: str, base: int = 0
) -> dict[str, torch.Tensor]:
    """Make tensors that lie in a mapping; they keep it alive, and nothing is read.

    Each tensor has a storage of its own, so that pickling one does not write the whole file, and nobody takes
    neighbours for tied tensors. A tensor at an offset that its dtype cannot view is copied.

    Args:
        buffer: The bytes of the file from `base` on.
        items: The tensors.
        file: The name of the file in errors.
        base: Offset in the file, a multiple of the size of any dtype.
    """
    tensors: dict[str, torch.Tensor] = {}
    frombuffer = torch.frombuffer
    for key, entry in items:
        name, shape, begin, end = entry
        dtype = None if name == "F4" else torch_dtype(name)
        dtype = dtype or dtype_of(key, entry, file)
        size = dtype.itemsize
        offset = begin - base
        if name == "F4":
            shape = shape_of(entry)
        if begin == end:
            tensors[key] = torch.empty(shape, dtype=dtype)
        elif offset % size:
            copy = bytearray(buffer[offset : end - base])
            tensors[key] = frombuffer(copy, dtype=dtype).view(shape)
        else:
            count = (end - begin) // size
            tensors[key] = frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(shape)
    return tensors


class Casting:
    """What dtype each tensor shall have.

    Args:
        rule: None: that of the file. A floating dtype: for tensors of an ordinary floating dtype (those of
            one byte or less are quantized, integers are no weights: both stay). A function of name and dtype.

    Raises:
        ConfigError: A dtype that is not a floating one.
    """

    _ORDINARY = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, rule: DtypeRule) -> None:
        if rule is not None and rule not in self._ORDINARY and not callable(rule):
            raise ConfigError(
                f"dtype={rule!r}: expected one of {', '.join(map(str, self._ORDINARY))}, "
                "or a function of name and dtype"
            )
        self._rule = rule

    def target(self, key: str, found: torch.dtype) -> torch.dtype:
        """Return the dtype that a tensor shall have."""
        if self._rule is None:
            return found
        if isinstance(self._rule, torch.dtype):
            return self._rule if found in self._ORDINARY else found
        return self._rule(key, found)

    def split(self, items: Items, file: str) -> tuple[list[Item], list[Item]]:
        """Return the tensors that stay as they are in the file, and those that are cast."""
        if self._rule is None:
            return list(items), []
        parts: tuple[list[Item], list[Item]] = ([], [])
        for key, entry in items:
            found = dtype_of(key, entry, file)
            parts[self.target(key, found) is not found].append((key, entry))
        return parts
