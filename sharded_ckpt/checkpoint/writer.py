"""Tensors straight from memory into safetensors files.

The bytes of a file stream from where the tensors are, in chunks from a few threads. A large file that must be
on the disk at the end goes there past the page cache, through three buffers of a chunk each; any other from
where the tensors are, and only what is not contiguous in host memory through a small staging buffer, piece by
piece. Nothing is serialised in memory.

Tensors are always written from memory, never copied from the file that they were mapped from: a change
through `.data` or numpy leaves no trace that would tell that the file is out of date.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from patchers.errors import CheckpointError
from patchers.names import fold
from sharded_ckpt.checkpoint.layout import TensorSpec, plan_file
from sharded_ckpt.checkpoint.pieces import CHUNK_BYTES
from sharded_ckpt.checkpoint.storage import LocalStorage, PathLike
from sharded_ckpt.checkpoint.stream import ByteStream

if TYPE_CHECKING:
    import torch

__all__ = ["CHUNK_BYTES", "DTYPE_NAMES", "LazyTensor", "WrittenFile", "aliases", "describe", "write_tensors"]

# Reached by name, so that planning a file needs no torch.
DTYPE_NAMES: Final[Mapping[str, str]] = {
    "torch.bool": "BOOL",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.uint16": "U16",
    "torch.int16": "I16",
    "torch.uint32": "U32",
    "torch.int32": "I32",
    "torch.uint64": "U64",
    "torch.int64": "I64",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.complex64": "C64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.float4_e2m1fn_x2": "F4",
}
"""The names that safetensors gives the dtypes of torch."""


@dataclass(frozen=True)
class WrittenFile:
    """What was written."""

    file_size: int
    """Bytes of the whole file."""
    tensors: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each tensor."""
    sha256: str | None = None


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when its turn comes to be written, and dropped after.

    Example:
        >>> import torch
        >>> lazy = LazyTensor(torch.float32, (2, 3), lambda: torch.zeros(2, 3))
        >>> describe({"weight": lazy})
        {'weight': ('F32', (2, 3))}
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    """Called once, on a thread of the writer, in file order."""


def describe(tensors: Mapping[str, torch.Tensor | LazyTensor]) -> dict[str, TensorSpec]:
    """Return dtype (as safetensors calls it) and shape of tensors that can be written.

    Raises:
        CheckpointError: Some hold no values, or values that safetensors cannot hold; all are named.
    """
    refused: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if reason := _why_not(tensor):
            refused.setdefault(reason, []).append(name)
    if refused:
        reasons = "; ".join(f"{fold(names)}: {reason}" for reason, names in refused.items())
        raise CheckpointError(f"these tensors cannot be saved: {reasons}")
    return {name: _describe_one(tensor) for name, tensor in tensors.items()}


def _why_not(tensor: torch.Tensor | LazyTensor) -> str | None:
    import torch

    if isinstance(tensor, LazyTensor):
        return None if str(tensor.dtype) in DTYPE_NAMES else f"safetensors has no {tensor.dtype}: convert it"
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}, not a tensor"
    if tensor.is_meta:
        return "on the meta device, without values: load or initialise it first, or leave it out"
    if hasattr(type(tensor), "__tensor_flatten__"):
        return f"a {type(tensor).__name__}, which wraps other tensors: save its local or inner tensor"
    if torch.nn.parameter.is_lazy(tensor):
        return f"a {type(tensor).__name__}, which has no shape yet: call the module once"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return f"neither dense nor plain ({tensor.layout}, {tensor.dtype}): convert it to a dense tensor"
    if str(tensor.dtype) not in DTYPE_NAMES:
        return f"safetensors has no {tensor.dtype}: convert it"
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        return "without memory, which was freed: save it where it is whole (FSDP gathers it for a moment)"
    return None


def _describe_one(tensor: torch.Tensor | LazyTensor) -> TensorSpec:
    dtype, shape = DTYPE_NAMES[str(tensor.dtype)], tuple(tensor.shape)
    if dtype == "F4":  # torch counts bytes, each of two elements, safetensors counts elements
        shape = (*shape[:-1], 2 * shape[-1])
    return dtype, shape


def write_tensors(
    path: PathLike,
    tensors: Mapping[str, torch.Tensor | LazyTensor],
    *,
    metadata: Mapping[str, str] | None = None,
    digest: bool = False,
    storage: LocalStorage | None = None,
) -> WrittenFile:
    """Stream tensors into a new safetensors file, and wait until it is on the disk.

    The file is visible while it grows: what others may read goes through `publish.transaction`. Views that
    share memory are written each with its own bytes. The tensors must not be changed meanwhile.

    Args:
        path: A file that does not exist yet.
        tensors: Dense tensors on any device, or lazy ones; the order is kept among those of equal item size.
        metadata: Strings for the header; `{"format": "pt"}`, which transformers asks for, if not given.
        digest: Whether to compute the SHA-256 of the file while it is written.
        storage: What writes; by default the local file system, durably.

    Raises:
        CheckpointError: A tensor cannot be written; nothing was created.
        OSError: Writing failed; the file may be there in part.
    """
    storage = storage or LocalStorage()
    layout = plan_file(describe(tensors), {"format": "pt"} if metadata is None else metadata)
    hasher = hashlib.sha256() if digest else None
    _wait_for_devices(tensors)
    fd = storage.create(path)
    try:
        storage.reserve(fd, layout.file_size)
        values = (_value(name, tensors[name]) for name in layout.tensors)
        stream = ByteStream(storage, fd, layout.header, values, hasher)
        stream.write(layout.file_size)
        if stream.nbytes != layout.file_size:
            raise CheckpointError(
                f"{path}: {layout.file_size} bytes were to be written, {stream.nbytes} were: "
                "the tensors have changed their sizes meanwhile"
            )
        storage.sync(fd)
    finally:
        storage.close(fd)
    sizes = {name: entry.nbytes for name, entry in layout.tensors.items()}
    return WrittenFile(layout.file_size, sizes, hasher.hexdigest() if hasher else None)


def _value(name: str, tensor: torch.Tensor | LazyTensor) -> torch.Tensor:
    if not isinstance(tensor, LazyTensor):
        return tensor.detach()
    made = tensor.make()
    if reason := _why_not(made):
        raise CheckpointError(f"{name} cannot be saved: {reason}")
    if (made.dtype, tuple(made.shape)) != (tensor.dtype, tuple(tensor.shape)):
        raise CheckpointError(
            f"{name} was announced as {tensor.dtype} of shape {tuple(tensor.shape)}, "
            f"made was {made.dtype} of shape {tuple(made.shape)}"
        )
    return made.detach()


def _wait_for_devices(tensors: Mapping[str, torch.Tensor | LazyTensor]) -> None:
    """Wait for work that the caller has queued: the threads here copy on streams that know nothing of it."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    for device in {tensor.device for tensor in tensors.values() if isinstance(tensor, torch.Tensor)}:
        if accelerator is not None and accelerator.type == device.type:
            torch.accelerator.synchronize(device)


def aliases(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Group names that stand for the very same memory, read in the same way; each name is in one group.

    Views that overlap otherwise are not aliases: they hold different values, and are written each on its own.

    Example:
        >>> import torch
        >>> weight = torch.zeros(2, 3)
        >>> aliases({"embed": weight, "head": weight, "row": weight[0]})
        [['embed', 'head'], ['row']]
    """
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        same: object = name
        if tensor.numel() and not tensor.is_meta:
            same = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            same = (*same, tensor.is_conj(), tensor.is_neg())
        groups.setdefault(same, []).append(name)
    return list(groups.values())
