"""What optimizers keep besides tensors, by the global names of parameters: pure data, the same on all ranks.

Nothing here depends on how many parameter groups an optimizer has, in which order they stand, or on which
rank a parameter is: options and values belong to names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchers.errors import CheckpointError
from patchers.names import fold
from sharded_ckpt.training.plain import from_plain, to_plain

STATE, GROUPS = "state", "param_groups"
"""How torch begins the keys of a flat optimizer state dict."""


def state_key(name: str, slot: str) -> str:
    """Return the key of one slot of the state of a parameter, as torch's own checkpoints have it.

    Example:
        >>> state_key("lm_head.weight", "exp_avg")
        'state.lm_head.weight.exp_avg'
    """
    return f"{STATE}.{name}.{slot}"


def split_key(key: str) -> tuple[str, str, str] | None:
    """Return kind (`state` or `param_groups`), parameter and slot of a key; None if it is no such key.

    Example:
        >>> split_key("param_groups.lm_head.weight.lr")
        ('param_groups', 'lm_head.weight', 'lr')
    """
    kind, _, rest = key.partition(".")
    name, _, slot = rest.rpartition(".")
    return (kind, name, slot) if kind in (STATE, GROUPS) and name and slot else None


@dataclass(frozen=True)
class ParamOptions:
    """Parameters that have the same options.

    Attributes:
        shapes: The shape of each, by global name.
        options: What stands in their parameter group, besides themselves.
    """

    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class OptimizerTable:
    """What the optimizers of one rank, or of all, keep besides tensors.

    Attributes:
        kinds: The names of the optimizers' classes.
        groups: Options, by parameters.
        values: State that is no tensor, by parameter and slot.
        scheduler: The state of the learning-rate scheduler, if there is one.
    """

    kinds: tuple[str, ...] = ()
    groups: tuple[ParamOptions, ...] = ()
    values: Mapping[str, Mapping[str, Any]] | None = None
    scheduler: Mapping[str, Any] | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return plain JSON data.

        Raises:
            ConfigError: An option or a value cannot be written as such; it is named.
        """
        groups = [
            {
                "params": {name: list(shape) for name, shape in group.shapes.items()},
                "options": to_plain(dict(group.options), "the options of a parameter group"),
            }
            for group in self.groups
        ]
        values = {n: to_plain(dict(v), f"the optimizer state of {n}") for n, v in (self.values or {}).items()}
        scheduler = (
            None if self.scheduler is None else to_plain(dict(self.scheduler), "the scheduler's state")
        )
        return {"optimizer": list(self.kinds), "groups": groups, "values": values, "scheduler": scheduler}

    @classmethod
    def from_plain(cls, said: Any, where: str) -> OptimizerTable:
        """Return the table that `to_plain` was called on.

        Raises:
            CheckpointError: It is none.
        """
        try:
            groups = [
                ParamOptions(
                    {name: tuple(shape) for name, shape in group["params"].items()},
                    from_plain(group["options"]),
                )
                for group in said["groups"]
            ]
            scheduler = None if said["scheduler"] is None else from_plain(said["scheduler"])
            values = {name: from_plain(value) for name, value in said["values"].items()}
            return cls(tuple(said["optimizer"]), tuple(groups), values, scheduler)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{where}: not the state of an optimizer: {type(error).__name__} {error}"
            ) from None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters."""
        return {name: shape for group in self.groups for name, shape in group.shapes.items()}

    @property
    def options(self) -> dict[str, Mapping[str, Any]]:
        """The options of all parameters."""
        return {name: group.options for group in self.groups for name in group.shapes}


def merge(tables: Sequence[OptimizerTable]) -> OptimizerTable:
    """Put together what the ranks keep.

    Args:
        tables: Of every rank, in rank order.

    Raises:
        CheckpointError: Ranks disagree about one parameter, or about the scheduler.
    """
    kinds = tuple(dict.fromkeys(kind for table in tables for kind in table.kinds))
    schedulers = [table.scheduler for table in tables if table.scheduler is not None]
    for other in schedulers[1:]:
        if odd := differing(schedulers[0], other):
            raise CheckpointError(f"the ranks' schedulers disagree on {', '.join(odd)}: step them alike")
    seen: dict[str, Mapping[str, Any]] = {}
    groups: list[ParamOptions] = []
    for group in (group for table in tables for group in table.groups):
        twice = [name for name in group.shapes if name in seen]
        if odd := [name for name in twice if differing(seen[name], group.options)]:
            raise CheckpointError(f"the ranks' optimizers have different options for {fold(odd)}")
        shapes = {name: shape for name, shape in group.shapes.items() if name not in seen}
        seen.update(dict.fromkeys(shapes, group.options))
        groups += [ParamOptions(shapes, group.options)] if shapes else []
    values: dict[str, Mapping[str, Any]] = {}
    for table in tables:
        for name, said in (table.values or {}).items():
            if differing(values.setdefault(name, said), said):
                raise CheckpointError(f"the ranks' optimizers have different values for {name}")
    return OptimizerTable(kinds, tuple(groups), values, schedulers[0] if schedulers else None)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names under which two mappings do not have the same.

    Example:
        >>> differing({"lr": 0.1, "betas": (0.9, 0.95)}, {"lr": 0.2, "betas": (0.9, 0.95)})
        ['lr']
    """
    names = {**one, **other}
    return [n for n in names if to_plain(one.get(n)) != to_plain(other.get(n))]
