"""How planned tensors come into memory: mapped, cast, copied, or carried to a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sharded_ckpt.checkpoint.copying import copy_tensors
from sharded_ckpt.checkpoint.garbage import paused_collection
from sharded_ckpt.checkpoint.shard import Plan, Progress, Shard
from sharded_ckpt.checkpoint.staging import StagingRing, cast_mapped
from sharded_ckpt.checkpoint.tensors import Casting, DtypeRule, dtype_of, shape_of, view_tensors
from sharded_ckpt.checkpoint.windows import Items, Window, whole_windows

MiB = 2**20
_BLOCK_BYTES = 4 * MiB


def read_tensors(
    plan: Plan,
    *,
    device: torch.device | str | int = "cpu",
    dtype: DtypeRule = None,
    materialize: bool = False,
    ring: bool = False,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Read planned tensors in the cheapest way that gives what is asked for; see `CheckpointReader.read`."""
    device, casting = torch.device(device), Casting(dtype)
    if device.type == "meta":
        return _describe(plan, casting)
    if device.type != "cpu" or ring:
        return _ring(device).read(plan, casting, progress)
    here = all([shard.attach() for shard, _ in plan])
    if materialize or not here:
        return _copy(plan, casting, progress)
    tensors: dict[str, torch.Tensor] = {}
    with paused_collection():
        for shard, items in plan:
            tensors.update(_map(shard, items, casting, progress))
    return tensors


def iter_tensors(plan: Plan, *, dtype: DtypeRule = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield planned tensors one by one; see `CheckpointReader.iter_tensors`."""
    casting = Casting(dtype)
    for shard, items in plan:
        for window in whole_windows(items, _BLOCK_BYTES):
            tensors = _read_window(shard, window)
            for key in list(tensors):
                tensor = tensors.pop(key)
                yield key, tensor.to(casting.target(key, tensor.dtype))
                del tensor


def _read_window(shard: Shard, window: Window) -> dict[str, torch.Tensor]:
    items = [(piece.key, piece.entry) for piece in window.pieces]
    if window.begin == window.end or not shard.attach():
        return copy_tensors([(shard, items)])
    mapping, offset = shard.map(window.begin, window.end)
    return view_tensors(mapping, items, shard.file, base=window.begin - offset)


def _map(shard: Shard, items: Items, casting: Casting, progress: Progress | None) -> dict[str, torch.Tensor]:
    kept, cast = casting.split(items, shard.file)
    tensors = view_tensors(shard.map()[0], kept, shard.file) if kept else {}
    if progress is not None:
        progress(sum(entry.nbytes for _, entry in kept))
    if cast:
        tensors |= cast_mapped(shard, cast, casting, progress)
        tensors = {key: tensors[key] for key, _ in items}
    return tensors


def _copy(plan: Plan, casting: Casting, progress: Progress | None) -> dict[str, torch.Tensor]:
    parts = [(shard, casting.split(items, shard.file)) for shard, items in plan]
    tensors = copy_tensors([(shard, kept) for shard, (kept, _) in parts], progress)
    if cast := [(shard, items) for shard, (_, items) in parts if items]:
        tensors |= _ring(torch.device("cpu")).read(cast, casting, progress)
        tensors = {key: tensors[key] for _, items in plan for key, _ in items}
    return tensors


def _ring(device: torch.device) -> StagingRing:
    """Return a ring of 32 MiB on the CPU, where it only has to keep the disk busy; of 128 MiB elsewhere."""
    if device.type == "cpu":
        return StagingRing(device, slots=8, slot_bytes=4 * MiB)
    return StagingRing(device, slots=16, slot_bytes=8 * MiB)


def _describe(plan: Plan, casting: Casting) -> dict[str, torch.Tensor]:
    return {
        key: torch.empty(
            shape_of(entry), dtype=casting.target(key, dtype_of(key, entry, shard.file)), device="meta"
        )
        for shard, items in plan
        for key, entry in items
    }
