"""The tensors of a model, each once, with the global names that it has and the modules that hold it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from patchers.errors import CheckpointError, ConfigError
from patchers.names import fold
from patchers.substitutes import Unowned
from sharded_ckpt.distribute.distribution import global_names
from sharded_ckpt.saving.saved_tensors import unwrapped
from sharded_ckpt.ties import ties_of
from sharded_ckpt.training.dtensors import check_layout, local_of, local_target

EXTRA_STATE: Final = "_extra_state"
"""How torch ends the names of what a module's `get_extra_state` gives."""


@dataclass(frozen=True)
class Place:
    """A tensor in memory, and everything by which it is known.

    Attributes:
        names: Its global names; several if it is tied.
        tensor: The live one.
        holders: Modules and the attributes under which they have it; none where it is only reached by name.
    """

    names: tuple[str, ...]
    tensor: Tensor
    holders: tuple[tuple[nn.Module, str], ...] = ()

    def check(self, value: Tensor | None = None) -> None:
        """Raise if this cannot be filled, at all or with a certain tensor.

        Raises:
            CheckpointError: It is on meta, and only the model's owner can make it real.
            ConfigError: The tensor is a DTensor that is spread otherwise.
        """
        if self.tensor.is_meta and (not self.holders or isinstance(self.tensor, DTensor)):
            raise CheckpointError(f"{self.names[0]} is on meta; call to_empty(device=…) on the model first")
        if isinstance(value, DTensor):
            check_layout(value, self.tensor)

    def fill(self, value: Tensor) -> None:
        """Put values there: into the memory that is there, or, on meta, as new memory.

        Args:
            value: All of the tensor, of the same shape; cast if its dtype is another one.
        """
        if not self.tensor.is_meta:
            with torch.no_grad():
                local_target(self.tensor).copy_(local_of(value, self.tensor))
            return
        made: Tensor = value.to(self.tensor.dtype, copy=True)
        if isinstance(self.tensor, nn.Parameter):
            made = nn.Parameter(made, self.tensor.requires_grad)
        for module, attribute in self.holders:
            setattr(module, attribute, made)


def parts_of(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """Return a model as the list of its parts.

    Raises:
        ConfigError: It is neither a module nor a list of some.
    """
    parts = [model] if isinstance(model, nn.Module) else list(model)
    if not parts or not all(isinstance(part, nn.Module) for part in parts):
        kinds = ", ".join(type(part).__name__ for part in parts) or "an empty list"
        raise ConfigError(f"expected a module or a list of modules, found {kinds}")
    return parts


def places_of(parts: Sequence[nn.Module]) -> list[Place]:
    """Return the parameters and persistent buffers of parts of one model.

    Raises:
        CheckpointError: Two parts have different tensors of one name: they number their blocks alike.
    """
    found: dict[int, tuple[Tensor, dict[str, None], list[tuple[nn.Module, str]]]] = {}
    named: dict[str, int] = {}
    for part in parts:
        state = _tensors_of(part)
        for key, name in global_names(state, type(part).__name__).items():
            tensor = state[key]
            if named.setdefault(name, id(tensor)) != id(tensor):
                raise CheckpointError(
                    f"two parts of the model have different tensors called {name}: parts must have the names "
                    "of the whole model, with the block numbers that they have there"
                )
            _, names, holders = found.setdefault(id(tensor), (tensor, {}, []))
            names[name] = None
            holders.append((part.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]))
    return [Place(tuple(names), tensor, tuple(holders)) for tensor, names, holders in found.values()]


def extra_states_of(parts: Sequence[nn.Module]) -> dict[str, tuple[nn.Module, Any]]:
    """Return what modules say besides tensors: by global name the module and its `get_extra_state()`."""
    plain = nn.Module.get_extra_state
    modules = {
        (f"{name}.{EXTRA_STATE}" if name else EXTRA_STATE): module
        for part in parts
        for name, module in part.named_modules()
        if type(module).get_extra_state is not plain
    }
    names = global_names(modules, "the model")
    return {names[key]: (module, module.get_extra_state()) for key, module in modules.items()}


def unowned_in(parts: Iterable[nn.Module]) -> tuple[str, ...]:
    """Return the names of the modules that are stubs in every part."""
    stubs = [{m.name for m in part.modules() if isinstance(m, Unowned)} for part in parts]
    return tuple(sorted(set.intersection(*stubs)))


def ties_said_by(parts: Iterable[nn.Module]) -> dict[str, str]:
    """Return which name the config ties to which; a shard may have forgotten its own ties."""
    ties: dict[str, str] = {}
    for part in map(unwrapped, parts):
        ties.update(ties_of(getattr(part, "config", None), type(part), part))
    return ties


def by_name(places: Iterable[Place]) -> dict[str, Tensor]:
    """Return the live tensors by each of their names."""
    return {name: place.tensor for place in places for name in place.names}


def is_extra_state(name: str) -> bool:
    """Return whether a name is that of a module's extra state.

    Example:
        >>> is_extra_state("mlp.linear_fc1._extra_state"), is_extra_state("mlp.weight")
        (True, False)
    """
    return name.rpartition(".")[2] == EXTRA_STATE


def without_extra_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the extra states of modules."""
    return {name: value for name, value in state.items() if not is_extra_state(name)}


def _tensors_of(part: nn.Module) -> dict[str, Tensor]:
    ignored = getattr(unwrapped(part), "_keys_to_ignore_on_save", None) or ()
    state = part.state_dict(keep_vars=True)
    kept = {k: v for k, v in state.items() if k not in ignored and not is_extra_state(k)}
    if odd := [key for key, value in kept.items() if not isinstance(value, Tensor)]:
        raise ConfigError(f"{fold(odd)} of {type(part).__name__} are no tensors, and cannot be saved as such")
    return kept
