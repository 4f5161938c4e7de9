"""Bytes of a file as torch tensors."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from functools import cache

import torch

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.entry import TensorEntry, shorten

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
        CheckpointError: This torch has no such dtype.
    """
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
    mapping: mmap.mmap, items: Iterable[tuple[str, TensorEntry]], file: str
) -> dict[str, torch.Tensor]:
    """Make tensors that lie in a mapping of a whole file; they keep it alive, and nothing is read.

    Each tensor has a storage of its own, so that pickling one does not write the whole file. A tensor at an
    offset that its dtype cannot view is copied.
    """
    tensors: dict[str, torch.Tensor] = {}
    frombuffer = torch.frombuffer
    for key, entry in items:
        dtype = torch_dtype(entry.dtype) or dtype_of(key, entry, file)
        name, shape, begin, end = entry
        size = dtype.itemsize
        if name == "F4":
            shape = shape_of(entry)
        if begin == end:
            tensors[key] = torch.empty(shape, dtype=dtype)
        elif begin % size:
            tensors[key] = frombuffer(bytearray(mapping[begin:end]), dtype=dtype).view(shape)
        else:
            tensors[key] = frombuffer(mapping, dtype=dtype, count=(end - begin) // size, offset=begin).view(
                shape
            )
    return tensors
