"""Tensors filled window by window: cast on the way, or carried to a device through a ring of buffers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch

from sharded_ckpt.checkpoint.host_memory import host_buffer
from sharded_ckpt.checkpoint.shard import Plan, Progress, Shard
from sharded_ckpt.checkpoint.tensors import Casting, dtype_of, shape_of
from sharded_ckpt.checkpoint.windows import Items, Window, cut_windows

_WINDOW_BYTES = 8 * 2**20
_GAP_BYTES = 64 * 2**10
_ALIGNMENT = 16
"""No dtype has larger elements."""


class Destination:
    """Tensors on a device, filled piece by piece and cast on the way.

    Args:
        plan: What will be filled.
        device: Where.
        casting: Which dtypes.
    """

    def __init__(self, plan: Plan, device: torch.device, casting: Casting) -> None:
        self.device = device
        self.tensors: dict[str, torch.Tensor] = {}
        self._flat: dict[str, torch.Tensor] = {}
        self._cast: dict[str, torch.dtype] = {}
        for shard, items in plan:
            for key, entry in items:
                found = dtype_of(key, entry, shard.file)
                target = casting.target(key, found)
                if target is found:  # bytes, which are copied without a look at their dtype
                    self._flat[key] = torch.empty(entry.nbytes, dtype=torch.uint8, device=device)
                    self.tensors[key] = self._flat[key].view(found).view(shape_of(entry))
                else:
                    self.tensors[key] = torch.empty(shape_of(entry), dtype=target, device=device)
                    self._flat[key] = self.tensors[key].view(-1)
                    self._cast[key] = found

    def fill(self, window: Window, buffer: torch.Tensor, base: int, non_blocking: bool = False) -> None:
        """Copy the pieces of a window to where they belong.

        Args:
            window: The pieces.
            buffer: Bytes of the file from `base` on.
            base: Offset in the file.
            non_blocking: Whether the copies may be under way when this returns.
        """
        for key, entry, begin, end in window.pieces:
            source = buffer[begin - base : end - base]
            first, last = begin - entry.begin, end - entry.begin
            if (found := self._cast.get(key)) is not None:
                first, last = first // found.itemsize, last // found.itemsize
                if source.device != self.device:  # bytes travel, the device casts
                    source = source.to(self.device, non_blocking=non_blocking)
                if source.storage_offset() % found.itemsize:
                    source = source.clone()
                source = source.view(found)
            self._flat[key][first:last].copy_(source, non_blocking=non_blocking)


def cast_mapped(
    shard: Shard, items: Items, casting: Casting, progress: Progress | None
) -> dict[str, torch.Tensor]:
    """Cast tensors of a local file straight from a mapping that follows the reading through the file.

    A window is unmapped before the next one is mapped, so that the pages of the file count no more than that
    to the memory of the process.
    """
    destination = Destination([(shard, items)], torch.device("cpu"), casting)
    for window in cut_windows(items, _WINDOW_BYTES):
        mapping, offset = shard.map(window.begin, window.end)
        buffer = torch.frombuffer(mapping, dtype=torch.uint8)
        destination.fill(window, buffer, window.begin - offset)
        if progress is not None:
            progress(sum(piece.end - piece.begin for piece in window.pieces))
    return destination.tensors


class StagingRing:
    """A ring of buffers between files and a device: threads read ahead into it while copies run out of it.

    The buffers are pinned where the device has pinned memory, so that copies need not wait; on the CPU, or
    where there is none, the same ring is made of ordinary memory.

    Args:
        device: Where the tensors go.
        slots: How many buffers.
        slot_bytes: Bytes of each, a multiple of 16.
        threads: How many threads read.
    """

    def __init__(self, device: torch.device, *, slots: int, slot_bytes: int, threads: int = 8) -> None:
        self.device = device
        self.slot_bytes = slot_bytes
        self._threads = threads
        self.buffers = [host_buffer(slot_bytes + _ALIGNMENT, device) for _ in range(slots)]
        self.is_pinned = device.type != "cpu" and all(buffer.is_pinned() for buffer in self.buffers)
        self._stream = None if device.type == "cpu" else torch.Stream(device=device)
        self._events: list[torch.Event | None] = [None] * slots

    def read(self, plan: Plan, casting: Casting, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        """Read tensors of files into new tensors on the device."""
        for shard, _ in plan:
            shard.attach()
        destination = Destination(plan, self.device, casting)
        jobs = (
            (shard, window)
            for shard, items in plan
            for window in cut_windows(items, self.slot_bytes, _GAP_BYTES)
        )
        if self._stream is not None:
            # The new tensors may lie where kernels that are still under way read or write.
            self._stream.wait_stream(torch.accelerator.current_stream(self.device))
        for window, slot in self._filled(jobs):
            base = window.begin - window.begin % _ALIGNMENT
            with self._copying():
                destination.fill(window, self.buffers[slot], base, non_blocking=self.is_pinned)
            self._mark(slot)
            if progress is not None:
                progress(sum(piece.end - piece.begin for piece in window.pieces))
        if self._stream is not None:
            self._stream.synchronize()
        return destination.tensors

    def _filled(self, jobs: Iterable[tuple[Shard, Window]]) -> Iterator[tuple[Window, int]]:
        """Read windows into slots, several at a time, and yield them in order.

        When the next one is asked for, the last one has been consumed and its slot may be filled again.
        """
        pending: deque[tuple[Window, int, Future[None]]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="checkpoint-ring") as pool:
            try:
                for number, (shard, window) in enumerate(jobs):
                    slot = number % len(self.buffers)
                    if len(pending) == len(self.buffers):
                        yield _finish(pending.popleft())
                    pending.append((window, slot, pool.submit(self._fill, slot, shard, window)))
                while pending:
                    yield _finish(pending.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self, slot: int, shard: Shard, window: Window) -> None:
        if (event := self._events[slot]) is not None:
            event.synchronize()
        shift = window.begin % _ALIGNMENT
        buffer = self.buffers[slot][shift : shift + window.end - window.begin]
        shard.readinto([buffer.numpy().data], window.begin)

    def _copying(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else self._stream

    def _mark(self, slot: int) -> None:
        """Note the copies out of a slot, which must end before it is filled again."""
        if self._stream is not None:
            event = torch.Event(device=self.device)
            event.record(self._stream)
            self._events[slot] = event


def _finish(job: tuple[Window, int, Future[None]]) -> tuple[Window, int]:
    window, slot, future = job
    future.result()
    return window, slot
