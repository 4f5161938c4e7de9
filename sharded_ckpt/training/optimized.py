"""A parameter that is trained, and the slots of its state: those that are there and those that come in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from patchers.errors import CheckpointError
from sharded_ckpt.training.dtensors import cut, local_of, local_target
from sharded_ckpt.training.optimizer_table import (
    GROUPS,
    OptimizerTable,
    ParamOptions,
    split_key,
)


@dataclass(frozen=True)
class Optimized:
    """A parameter that an optimizer of this rank trains.

    Attributes:
        names: Its global names; several if it is tied.
        partners: Names whose state serves as well: it is tied to them in the whole model.
        parameter: Itself.
        group: Its parameter group.
        optimizer: The optimizer.
    """

    names: tuple[str, ...]
    partners: tuple[str, ...]
    parameter: nn.Parameter
    group: dict[str, Any]
    optimizer: Optimizer

    @property
    def state(self) -> dict[str, Any]:
        """What the optimizer keeps of it; empty before the first step."""
        return self.optimizer.state.get(self.parameter, {})


def zeros_of_adam(item: Optimized) -> dict[str, Any]:
    """Return what Adam's first step finds, which is what it makes itself if it finds nothing."""
    on_device = item.group.get("capturable") or item.group.get("fused")
    where = item.parameter.device if on_device else torch.device("cpu")
    slots = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if item.group.get("amsgrad") else [])
    zeros: dict[str, Any] = {slot: torch.zeros_like(item.parameter) for slot in slots}
    return {"step": torch.zeros((), dtype=torch.float32, device=where), **zeros}


def filled_slot(item: Optimized, slot: str, value: Tensor, shared: bool) -> Tensor:
    """Return a slot with the values of the checkpoint: the tensor that is there, filled, or a new one."""
    live, parameter = item.state.get(slot), item.parameter
    if isinstance(live, Tensor) and has_room(live, value):
        with torch.no_grad():
            local_target(live).copy_(local_of(value, live))
        return live
    if isinstance(value, DTensor):
        return value.clone()
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return cut(value, parameter).clone()
    on_device = value.dim() > 0 or item.group.get("capturable") or item.group.get("fused")
    return value.to(parameter.device if on_device else "cpu", copy=shared)


def has_room(live: Any, value: Any) -> bool:
    """Return whether a slot has a tensor that a value can be copied into as it is.

    Args:
        live: What the slot has.
        value: A tensor, or anything else that has its shape and dtype.
    """
    return isinstance(live, Tensor) and (live.shape, live.dtype) == (value.shape, value.dtype)


def from_flat(
    flat: Mapping[str, Any], optimized: Iterable[Optimized]
) -> tuple[dict[str, Tensor], OptimizerTable]:
    """Take apart a flat state dict into tensors and the rest."""
    shapes = {
        name: tuple(item.parameter.shape) for item in optimized for name in (*item.names, *item.partners)
    }
    tensors: dict[str, Tensor] = {}
    options: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if (parts := split_key(key)) is None:
            raise CheckpointError(
                f"{key} is no key of a flat optimizer state dict; such a key is state.<parameter>.<slot> or "
                "param_groups.<parameter>.<option> (torch's flatten_optimizer_state_dict=True gives them)"
            )
        kind, name, slot = parts
        options.setdefault(name, {})
        if kind == GROUPS:
            options[name][slot] = value
        elif isinstance(value, Tensor):
            _check_slot(key, value, shapes.get(name))
            tensors[key] = value
        else:
            values.setdefault(name, {})[slot] = value
    groups = [ParamOptions({name: shapes.get(name, ())}, said) for name, said in options.items()]
    return tensors, OptimizerTable((), tuple(groups), values)


def _check_slot(key: str, value: Tensor, shape: tuple[int, ...] | None) -> None:
    if shape is not None and value.dim() == len(shape) and tuple(value.shape) != shape:
        raise CheckpointError(f"{key} has shape {tuple(value.shape)}, the parameter here has {shape}")
