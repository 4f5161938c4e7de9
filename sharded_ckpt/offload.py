"""One shard over several devices, host memory and disk: accelerate's hooks, fed with our parts."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from accelerate import dispatch_model
from accelerate.utils import get_max_memory
from torch import nn
from transformers import PreTrainedModel

from patchers.descriptor import ModelDescriptor
from patchers.errors import ConfigError
from patchers.names import fold
from patchers.tables import amount
from sharded_ckpt.ownership.budgets import Budget, read_budgets
from sharded_ckpt.ownership.skeleton import modules_beside, nbytes_of

Device: TypeAlias = "int | str | torch.device"
"""The number or name of an accelerator, "cpu", or "disk"."""

DISK = "disk"


def dispatch_shard(
    model_shard: PreTrainedModel,
    device_map: Mapping[str, Device] | None = None,
    *,
    max_memory: Mapping[Device, Budget] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    descriptor: ModelDescriptor | str = "auto",
) -> PreTrainedModel:
    """Spread a shard over devices, host memory and disk, in place; it computes what it computed before.

    What lives on an accelerator is computed there, and hidden states follow. What is kept in host memory or
    on disk is brought, part by part, to where it is computed (the first accelerator, or the CPU), and dropped
    again. Stages of a pipeline may be spread like whole models. Training and saving need the tensors, so
    they refuse a shard that is in part elsewhere.

    A shard on the CPU that was loaded without `materialize` is mapped from its files, so it needs no memory
    of its own as it is: the kernel reads what runs, and drops it when memory is short.

    Args:
        model_shard: As `load_and_shard_model` returns it, whole or partial.
        device_map: Where each part goes, by the dotted name of a module. By default parts fill the devices of
            `max_memory` one after the other, in the order in which they run.
        max_memory: What each device may hold, in the order in which they are to be filled: a number of bytes,
            or a text such as "20GiB". By default the free memory of all accelerators and of the host. What
            fits nowhere goes to disk.
        offload_dir: Where to write what goes to disk; by default a directory that goes with the model.
        descriptor: A `ModelDescriptor`, the name of a family, or `"auto"`.

    Returns:
        The same model; `hf_device_map` says where its parts are.

    Raises:
        ConfigError: A part is given no place, or a name in the map is no module.

    Example:
        >>> from sharded_ckpt import load_and_shard_model
        >>> shard = load_and_shard_model("auto", checkpoint)  # the path of a checkpoint
        >>> shard = dispatch_shard(shard, max_memory={"cpu": "200 kB"})
        >>> shard.hf_device_map["model.layers.0"], shard.hf_device_map["lm_head"]
        ('cpu', 'disk')
        >>> shard(torch.tensor([[1, 5, 7]])).logits.shape
        torch.Size([1, 3, 128])
    """
    described = ModelDescriptor.of(descriptor, model_shard.config)
    parts = dict(_parts(model_shard, described))
    if device_map is None:
        limits = get_max_memory() if max_memory is None else max_memory
        chosen = _filled(parts, {device: read_budgets(limit, 1)[0] for device, limit in limits.items()})
    else:
        chosen = dict(device_map)
    _check(model_shard, chosen, parts)
    if described.head in chosen and _is_tied(model_shard, described):
        chosen[str(described.head)] = chosen[described.embedding]
    if offload_dir is None and DISK in chosen.values():
        folder = tempfile.TemporaryDirectory(prefix="sharded-ckpt-offload-")
        weakref.finalize(model_shard, folder.cleanup)
        offload_dir = folder.name
    dispatched: PreTrainedModel = dispatch_model(
        model_shard,
        chosen,
        main_device=_main_device(chosen),
        offload_dir=offload_dir,
        skip_keys=getattr(model_shard, "_skip_keys_device_placement", None),
        force_hooks=True,
    )
    return dispatched


def _parts(model: nn.Module, descriptor: ModelDescriptor) -> Iterator[tuple[str, int]]:
    """Yield what is placed as one, in the order in which it runs, and its bytes; stubs hold nothing."""
    count = len(list(model.get_submodule(descriptor.layers).children()))
    blocks = [descriptor.block_name(index) for index in range(count)]
    ends = [name for name in (descriptor.final_norm, descriptor.head) if name is not None]
    for name in (*modules_beside(model, {descriptor.layers, *ends}), *blocks, *ends):
        if size := nbytes_of(model.get_submodule(name)):
            yield name, size


def _filled(parts: Mapping[str, int], limits: Mapping[Device, float]) -> dict[str, Device]:
    """Fill the devices in their order; what is brought to the first one needs room for the largest part."""
    if sum(parts.values()) <= next(iter(limits.values()), 0):
        return dict.fromkeys(parts, next(iter(limits)))
    free = dict(limits)
    first = next(iter(free), None)
    if first is not None and first != "cpu" and sum(parts.values()) > sum(_held_where_computed(free)):
        free[first] -= max(parts.values())
    chosen: dict[str, Device] = {}
    order = [*free, DISK]
    for name, size in parts.items():
        while order[0] != DISK and free[order[0]] < size:
            order.pop(0)
        chosen[name] = order[0]
        if order[0] != DISK:
            free[order[0]] -= size
    return chosen


def _held_where_computed(limits: Mapping[Device, float]) -> list[float]:
    return [limit for device, limit in limits.items() if device not in ("cpu", DISK)]


def _check(model: nn.Module, chosen: Mapping[str, Device], parts: Mapping[str, int]) -> None:
    modules = {name for name, _ in model.named_modules()}
    if unknown := sorted(set(chosen) - modules):
        raise ConfigError(f"device_map names {fold(unknown)}, which the model does not have")
    inside = [name for name in chosen if any(_is_in(name, place) for place in chosen if place != name)]
    if inside:
        raise ConfigError(f"device_map has {fold(inside)} and also a module that it is part of; keep one")
    held = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    nowhere = [name for name in held if not any(_is_in(name, place) for place in chosen)]
    if nowhere:
        raise ConfigError(
            f"device_map gives no place to {fold(nowhere)}; its parts are {fold(parts)} "
            f"({amount(sum(parts.values()), 'bytes')})"
        )


def _is_in(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _is_tied(model: PreTrainedModel, descriptor: ModelDescriptor) -> bool:
    if descriptor.head is None:
        return False
    weights = [
        getattr(model.get_submodule(name), "weight", None) for name in (descriptor.embedding, descriptor.head)
    ]
    return isinstance(weights[0], nn.Parameter) and weights[0] is weights[1]


def _main_device(chosen: Mapping[str, Device]) -> Device:
    return next((device for device in chosen.values() if str(device) not in ("cpu", DISK)), "cpu")
