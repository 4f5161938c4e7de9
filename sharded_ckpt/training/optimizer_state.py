"""The state of optimizers, one tensor for each parameter and slot, under the parameters' global names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from patchers.errors import CheckpointError, ConfigError, MissingKeysError
from patchers.names import fold
from sharded_ckpt.ties import others_of, partners_of
from sharded_ckpt.training.optimized import Optimized, filled_slot, from_flat, zeros_of_adam
from sharded_ckpt.training.optimizer_table import (
    GROUPS,
    STATE,
    OptimizerTable,
    ParamOptions,
    differing,
    split_key,
    state_key,
)
from sharded_ckpt.training.places import parts_of, places_of, ties_said_by
from sharded_ckpt.training.schedulers import check_schedulers, fill_schedulers, state_of

logger = logging.getLogger(__name__)

_LAZY_ADAM = (torch.optim.Adam, torch.optim.AdamW)


class OptimizerState:
    """Optimizers as state: a tensor for each parameter and slot, by names that hold for the whole model.

    So what any number of ranks has saved, any other number can load, whatever blocks they own. It has the
    `state_dict` and `load_state_dict` that `torch.distributed.checkpoint` asks of a `Stateful`.

    Args:
        model: The model, or its parts, as for `ModelState`.
        optimizer: One, or several; None on a rank that trains nothing.
        scheduler: A learning-rate scheduler, or several that step alike.
        is_peft: Accepted for those who call it so; what is trained is known from the optimizer.

    Raises:
        ConfigError: An optimizer holds a parameter that is no part of the model.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> adam = torch.optim.AdamW(model.parameters())
        >>> sorted(OptimizerState(model, adam).state_dict()["optim"])[-3:]
        ['state.weight.exp_avg', 'state.weight.exp_avg_sq', 'state.weight.step']
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer] | None,
        scheduler: Any = None,
        is_peft: bool = False,
        *,
        cpu_offload: bool = False,
    ) -> None:
        self.model = parts_of(model)
        self.optimizer: list[Optimizer] = _listed(optimizer)
        self.scheduler: list[Any] = _listed(scheduler)
        self.is_peft, self.cpu_offload = is_peft, cpu_offload
        list(self.optimized())  # says now what would fail later

    def state_dict(self) -> dict[str, Any]:
        """Return `{"optim": …}`, flat, with the keys of torch's own checkpoints, and maybe `"sched"`.

        An Adam or AdamW that has not stepped yet gets the zeros that its first step would give it, so that
        `torch.distributed.checkpoint.load` has something to fill. (torch itself takes a step for that, and
        the count of steps is one too high from then on.) `save_training_state` does not do this.
        """
        self._materialise()
        optim: dict[str, Any] = {key: self._moved(tensor) for key, tensor in self.tensors().items()}
        for item in self.optimized():
            options = {name: value for name, value in item.group.items() if name != "params"}
            optim |= {f"{GROUPS}.{item.names[0]}.{name}": value for name, value in options.items()}
            plain = {slot: value for slot, value in item.state.items() if not isinstance(value, Tensor)}
            optim |= {state_key(item.names[0], slot): value for slot, value in plain.items()}
        return {"optim": optim, **({"sched": state_of(self.scheduler)} if self.scheduler else {})}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Fill optimizers and schedulers; all is compared first: everything is filled, or nothing.

        Args:
            state_dict: As `state_dict` gives it; it is not changed. Without `"sched"` schedulers stay as they
                are.

        Raises:
            MissingKeysError: There is nothing for a parameter that an optimizer trains.
            CheckpointError: State of parameters that are not here, or of another shape.
        """
        tensors, table = from_flat(state_dict.get("optim", {}), self.optimized())
        plan = self.plan(table, tensors)
        known = {name for item in self.optimized() for name in (*item.names, *item.partners)}
        if strange := sorted(set(table.shapes) - known):
            raise CheckpointError(
                f"the optimizer state is also of {fold(strange)}, which is not trained here"
            )
        check_schedulers(self.scheduler, state_dict.get("sched"))
        self.fill(plan, table, ((key, tensors[key].clone()) for key in plan))
        if state_dict.get("sched") is not None:
            fill_schedulers(self.scheduler, state_dict["sched"])

    # What is saved

    def optimized(self) -> Iterator[Optimized]:
        """Give every parameter that an optimizer of this rank trains."""
        places = {id(place.tensor): place for place in places_of(self.model)}
        partners = partners_of(ties_said_by(self.model))
        for optimizer in self.optimizer:
            for number, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    if id(parameter) not in places:
                        raise ConfigError(
                            f"parameter group {number} of the {type(optimizer).__name__} has a parameter of "
                            f"shape {tuple(parameter.shape)} that is no part of the model: make the "
                            "optimizer after the model was wrapped, and pass the model that it trains"
                        )
                    names = places[id(parameter)].names
                    yield Optimized(names, others_of(names, partners), parameter, group, optimizer)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the state by `state.<parameter>.<slot>`; they are the optimizer's own."""
        return {
            state_key(item.names[0], slot): value
            for item in self.optimized()
            for slot, value in item.state.items()
            if isinstance(value, Tensor)
        }

    @property
    def ties(self) -> dict[str, str]:
        """Which key of the state is tied to which, as the parameters are in the whole model."""
        ties = ties_said_by(self.model)
        slots = {slot for item in self.optimized() for slot in item.state}
        return {state_key(t, slot): state_key(s, slot) for t, s in ties.items() for slot in slots}

    def table(self) -> OptimizerTable:
        """Return what there is besides tensors."""
        groups: dict[int, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {}
        values: dict[str, dict[str, Any]] = {}
        for item in self.optimized():
            options = {name: value for name, value in item.group.items() if name != "params"}
            shapes, _ = groups.setdefault(id(item.group), ({}, options))
            shapes[item.names[0]] = tuple(item.parameter.shape)
            plain = {slot: value for slot, value in item.state.items() if not isinstance(value, Tensor)}
            values |= {item.names[0]: plain} if plain else {}
        kinds = tuple(type(optimizer).__name__ for optimizer in self.optimizer)
        said = state_of(self.scheduler) if self.scheduler else None
        return OptimizerTable(kinds, tuple(ParamOptions(*pair) for pair in groups.values()), values, said)

    # What is loaded

    def plan(self, table: OptimizerTable, keys: Mapping[str, Any]) -> dict[str, list[tuple[Optimized, str]]]:
        """Work out which key feeds which slots of which parameters.

        Args:
            table: What the checkpoint says of its optimizers.
            keys: The tensors of the checkpoint.

        Raises:
            MissingKeysError: The checkpoint knows nothing of a parameter that an optimizer here trains.
            CheckpointError: A parameter had another shape.
            ConfigError: Parameters that share a group here had different options.
        """
        slots: dict[str, list[str]] = {}
        for key in keys:
            if (parts := split_key(key)) is not None and parts[0] == STATE:
                slots.setdefault(parts[1], []).append(parts[2])
        shapes = table.shapes
        feeds: dict[str, list[tuple[Optimized, str]]] = {}
        missing, wrong = [], []
        for item in self.optimized():
            name = next((name for name in (*item.names, *item.partners) if name in shapes), None)
            if name is None:
                missing.append(item.names[0])
            elif shapes[name] != tuple(item.parameter.shape):
                wrong.append(f"{name} had shape {shapes[name]}, here it has {tuple(item.parameter.shape)}")
            else:
                source = next((n for n in (*item.names, *item.partners) if n in slots), name)
                for slot in slots.get(source, ()):
                    feeds.setdefault(state_key(source, slot), []).append((item, slot))
        if missing:
            raise MissingKeysError(
                f"the checkpoint has no optimizer state of {fold(missing)}, which an optimizer here trains; "
                "to start with a fresh optimizer, load the model alone"
            )
        if wrong:
            raise CheckpointError(f"the optimizer state does not fit: {'; '.join(wrong[:4])}")
        self._options_of_groups(table)
        return feeds

    def fill(
        self,
        feeds: Mapping[str, Sequence[tuple[Optimized, str]]],
        table: OptimizerTable,
        items: Iterable[tuple[str, Tensor]],
    ) -> None:
        """Give the optimizers their tensors, values and options; state that they had and do not get goes.

        Args:
            feeds: What `plan` gave.
            table: What the checkpoint says of its optimizers.
            items: The tensors that `feeds` names. One that needs no change of place is kept as it is.
        """
        kinds = tuple(type(optimizer).__name__ for optimizer in self.optimizer)
        if strange := [kind for kind in kinds if table.kinds and kind not in table.kinds]:
            logger.warning(
                "the state was saved from %s and is loaded into %s; slots are taken over by name",
                ", ".join(table.kinds),
                ", ".join(strange),
            )
        for group, options in self._options_of_groups(table):
            _set_options(group, options)
        states: dict[int, tuple[Optimized, dict[str, Any]]] = {}
        for item in self.optimized():
            known = (table.values or {}).get
            values = next(filter(None, map(known, (*item.names, *item.partners))), {})
            states[id(item.parameter)] = (item, dict(values))
        for key, tensor in items:
            for item, slot in feeds[key]:
                states[id(item.parameter)][1][slot] = filled_slot(item, slot, tensor, len(feeds[key]) > 1)
        for item, state in states.values():
            item.optimizer.state[item.parameter] = state
            if not state:
                del item.optimizer.state[item.parameter]

    def _options_of_groups(self, table: OptimizerTable) -> list[tuple[dict[str, Any], Mapping[str, Any]]]:
        """Return the parameter groups here, each with the options that its parameters were saved with."""
        groups: dict[int, tuple[dict[str, Any], Mapping[str, Any]]] = {}
        saved = table.options
        for item in self.optimized():
            options = next(saved[name] for name in (*item.names, *item.partners) if name in saved)
            _, said = groups.setdefault(id(item.group), (item.group, options))
            if odd := differing(said, options):
                raise ConfigError(
                    f"parameters that share a group here had different {', '.join(odd)} when they were saved "
                    f"({item.names[0]} is one): group them as they were"
                )
        return list(groups.values())

    def _materialise(self) -> None:
        fresh = [o for o in self.optimizer if isinstance(o, _LAZY_ADAM) and not o.state]
        for item in self.optimized() if fresh else ():
            if any(item.optimizer is optimizer for optimizer in fresh) and item.parameter.requires_grad:
                item.optimizer.state[item.parameter] = zeros_of_adam(item)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.detach().cpu() if self.cpu_offload else tensor.detach()


def _set_options(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        live = group.get(name)
        if isinstance(live, Tensor) and isinstance(value, Tensor | float | int):
            live.fill_(value)
        else:
            group[name] = tuple(value) if isinstance(live, tuple) else value


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
