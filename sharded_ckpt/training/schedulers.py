"""Learning-rate schedulers as state: one for all, however many parameter groups each of them serves.

What a scheduler keeps once for each group can mostly be read off the groups themselves, whose options are
restored by the names of their parameters: it is left out of the state where that is so, and read off again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from patchers.errors import ConfigError
from sharded_ckpt.training.optimizer_table import differing

logger = logging.getLogger(__name__)

_DERIVED: Final = {"base_lrs": "initial_lr", "_last_lr": "lr"}
"""What is kept for each group, and the option of the group that it is."""

_PER_GROUP: Final = ("base_lrs", "min_lrs", "max_lrs", "lr_lambdas")


def state_of(schedulers: Sequence[Any]) -> dict[str, Any]:
    """Return the one state of schedulers that step alike.

    Raises:
        ConfigError: They do not.
    """
    first, *others = map(_state_of, schedulers)
    for other in others:
        if odd := differing(first, other):
            raise ConfigError(
                f"the schedulers are not in step: they have different {', '.join(odd)}, and one state is "
                "saved for all of them"
            )
    return first


def fill_schedulers(schedulers: Sequence[Any], state: Mapping[str, Any]) -> None:
    """Give every scheduler a state.

    Args:
        schedulers: Of optimizers whose options have been restored before.
        state: What `state_of` gave, here or on another rank.

    Raises:
        ConfigError: The state has different values for parameter groups, and here are more or fewer of them.
    """
    for scheduler in schedulers:
        scheduler.load_state_dict({**scheduler.state_dict(), **_fitting(scheduler, state)})
        _derive(scheduler, state)


def check_schedulers(schedulers: Sequence[Any], state: Mapping[str, Any] | None) -> None:
    """Find out whether schedulers can take a state; nothing is changed. What has no counterpart is logged.

    Raises:
        ConfigError: The state has different values for parameter groups, and here are more or fewer of them.
    """
    for scheduler in schedulers if state is not None else ():
        _fitting(scheduler, state or {})
    if schedulers and state is None:
        logger.warning(
            "no state of a scheduler was saved: the %s starts afresh", type(schedulers[0]).__name__
        )


def _state_of(scheduler: Any) -> dict[str, Any]:
    state = dict(scheduler.state_dict())
    groups = scheduler.optimizer.param_groups
    for name, option in _DERIVED.items():
        if name in state and list(state[name]) == [group.get(option) for group in groups]:
            del state[name]
    for name in (name for name in _PER_GROUP if isinstance(state.get(name), list)):
        state[name] = state[name][:1] if _all_equal(state[name]) else state[name]
    if inner := _inner(scheduler):
        state["_schedulers"] = [_state_of(one) for one in inner]
    return state


def _fitting(scheduler: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with as many values as there are groups here."""
    fitting, count = dict(state), len(scheduler.optimizer.param_groups)
    for name in (name for name in _PER_GROUP if isinstance(state.get(name), list)):
        values = state[name]
        if len(values) != count and not _all_equal(values):
            raise ConfigError(
                f"the scheduler was saved with {len(values)} parameter groups that have different {name}; "
                f"here are {count}: group the parameters as they were"
            )
        fitting[name] = values if len(values) == count else values[:1] * count
    if len(state.get("_last_lr", ())) != count:
        fitting.pop("_last_lr", None)
    if inner := _inner(scheduler):
        pairs = zip(inner, state["_schedulers"], strict=True)
        fitting["_schedulers"] = [{**one.state_dict(), **_fitting(one, said)} for one, said in pairs]
    return fitting


def _derive(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Read off the groups what the state leaves out."""
    groups = scheduler.optimizer.param_groups
    for name, option in _DERIVED.items():
        known = name in state and (name != "_last_lr" or len(state[name]) == len(groups))
        if not known and hasattr(scheduler, name) and all(option in group for group in groups):
            setattr(scheduler, name, [group[option] for group in groups])
    for inner, said in zip(_inner(scheduler), state.get("_schedulers", ()), strict=True):
        _derive(inner, said)


def _all_equal(values: list[Any]) -> bool:
    return not differing({"all": values[:1] * len(values)}, {"all": values})


def _inner(scheduler: Any) -> list[Any]:
    """Return the schedulers of which one is made."""
    return list(getattr(scheduler, "_schedulers", ()))
