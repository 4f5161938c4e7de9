"""Tensors straight from memory into safetensors files.

The bytes of a file stream from where the tensors are: `pwrite` in chunks from two threads, each chunk handed
to the disk as soon as it is complete, so that copying and writing back overlap. Nothing is serialised in
memory; only what is not contiguous in host memory passes through a small staging buffer, piece by piece.

Tensors are always written from memory, never copied from the file that they were mapped from: a change
through `.data` or numpy leaves no trace that would tell that the file is out of date.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from patchers.errors import CheckpointError
from patchers.names import fold
from sharded_ckpt.checkpoint.layout import FileLayout, TensorSpec, plan_file
from sharded_ckpt.checkpoint.storage import LocalStorage, PathLike

if TYPE_CHECKING:
    import torch

CHUNK_BYTES: Final = 8 << 20
"""How much one write call takes."""

STAGING_BYTES: Final = 4 << 20
"""Staging buffer of one thread, for tensors that are not contiguous in host memory."""

THREADS: Final = 2

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

_ALIGNMENT = (
    4096  # of the data: whole pages, so that a mapping of it is aligned for every dtype and for direct I/O
)
_STAGING_ALIGNMENT = 16  # the largest item of any dtype
_MAX_PIECES = 1024  # IOV_MAX of Linux


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
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return f"neither dense nor plain ({tensor.layout}, {tensor.dtype}): convert it to a dense tensor"
    if str(tensor.dtype) not in DTYPE_NAMES:
        return f"safetensors has no {tensor.dtype}: convert it"
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
    fd = storage.create(path)
    try:
        storage.reserve(fd, layout.file_size)
        _Stream(storage, fd, layout, tensors, hasher).run()
        storage.sync(fd)
    finally:
        storage.close(fd)
    sizes = {name: entry.nbytes for name, entry in layout.tensors.items()}
    return WrittenFile(layout.file_size, sizes, hasher.hexdigest() if hasher else None)


class _Stream:
    """The bytes of one file, taken in file order under a lock, written outside of it by several threads."""

    def __init__(
        self,
        storage: LocalStorage,
        fd: int,
        layout: FileLayout,
        tensors: Mapping[str, torch.Tensor | LazyTensor],
        hasher: hashlib._Hash | None,
    ) -> None:
        self._storage, self._fd, self._layout, self._hasher = storage, fd, layout, hasher
        self._tensors = tensors
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._batches = _batches(layout.header, map(self._get, layout.tensors))

    def run(self) -> None:
        eager = (tensor for tensor in self._tensors.values() if not isinstance(tensor, LazyTensor))
        for device in {tensor.device for tensor in eager}:
            _wait_for(device)
        if self._layout.file_size <= CHUNK_BYTES:
            return self._work()
        with ThreadPoolExecutor(THREADS, thread_name_prefix="write-tensors") as pool:
            try:
                for done in [pool.submit(self._work) for _ in range(THREADS)]:
                    done.result()
            finally:
                self._stop.set()

    def _work(self) -> None:
        staging = _Staging()
        try:
            while (taken := self._take(staging)) is not None:
                offset, buffers = taken
                self._storage.write(self._fd, buffers, offset)
                self._storage.start_writeback(self._fd, offset, sum(map(len, buffers)))
        finally:  # this thread is through, by an error or because nothing is left for any of them
            self._stop.set()

    def _get(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if not isinstance(tensor, LazyTensor):
            return tensor.detach()
        made = tensor.make()
        if found := _why_not(made):
            raise CheckpointError(f"{name} cannot be saved: {found}")
        if (made.dtype, tuple(made.shape)) != (tensor.dtype, tuple(tensor.shape)):
            raise CheckpointError(
                f"{name} was announced as {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"made was {made.dtype} of shape {tuple(made.shape)}"
            )
        return made.detach()

    def _take(self, staging: _Staging) -> tuple[int, list[memoryview]] | None:
        with self._lock:
            batch = None if self._stop.is_set() else next(self._batches, None)
            if batch is None:
                return None
            offset, pieces = batch
            staging.clear()
            buffers = [piece if isinstance(piece, memoryview) else staging.copy(piece) for piece in pieces]
            if self._hasher:
                for buffer in buffers:
                    self._hasher.update(buffer)
            return offset, buffers


_Piece: TypeAlias = "memoryview | torch.Tensor"


def _batches(header: bytes, tensors: Iterable[torch.Tensor]) -> Iterator[tuple[int, list[_Piece]]]:
    """Group the pieces of a file into writes: what is small goes together, with its offset in the file."""
    batch: list[_Piece] = [memoryview(header)]
    offset, total, staged = 0, len(header), 0
    for tensor in tensors:
        for piece, nbytes in _pieces(tensor):
            copies = 0 if isinstance(piece, memoryview) else nbytes + _STAGING_ALIGNMENT
            if total + nbytes > CHUNK_BYTES or staged + copies > STAGING_BYTES or len(batch) == _MAX_PIECES:
                yield offset, batch
                offset, batch, total, staged = offset + total, [], 0, 0
            batch.append(piece)
            total, staged = total + nbytes, staged + copies
    yield offset, batch


def _pieces(tensor: torch.Tensor) -> Iterator[tuple[_Piece, int]]:
    """Cut a tensor into runs of its row-major bytes: memory as it is where possible, else parts to copy."""
    if tensor.numel() == 0:
        return
    if tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        memory = _memory(tensor)
        for begin in range(0, len(memory), CHUNK_BYTES):
            piece = memory[begin : begin + CHUNK_BYTES]
            yield piece, len(piece)
    else:
        for part in _parts(tensor, STAGING_BYTES - _STAGING_ALIGNMENT):
            yield part, part.nbytes


def _memory(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _parts(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """Cut along the first dimension until no part is larger than the limit in bytes, in row-major order."""
    if tensor.nbytes <= limit:
        yield tensor
        return
    rows = limit // (tensor.nbytes // tensor.shape[0])
    for begin in range(0, tensor.shape[0], max(rows, 1)):
        yield from [tensor[begin : begin + rows]] if rows else _parts(tensor[begin], limit)


class _Staging:
    """Host memory of one thread that pieces of tensors are copied into on their way to the file."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._used = 0

    def clear(self) -> None:
        self._used = 0

    def copy(self, piece: torch.Tensor) -> memoryview:
        import torch

        if self._buffer is None:
            # Pinned memory is what devices copy into at full speed.
            pinned = piece.device.type != "cpu" and torch.accelerator.is_available()
            self._buffer = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=pinned)
        taken = self._buffer[self._used : self._used + piece.nbytes]
        taken.view(piece.dtype).view(piece.shape).copy_(piece)
        self._used += -(-piece.nbytes // _STAGING_ALIGNMENT) * _STAGING_ALIGNMENT
        return taken.numpy().data


def _wait_for(device: torch.device) -> None:
    """Wait for work that the caller queued: the threads here copy on streams that know nothing of it."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
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
