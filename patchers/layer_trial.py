"""Experiments with one decoder layer: a real copy of it is run on the CPU with some of its parts exchanged.

Whatever does a layer's work is exchanged in every experiment, so that a layer of any size is small here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchers.meta import NothingFound
from patchers.substitutes import Removed, hidden_states_of, returned


@dataclass
class Calls:
    """What one traced forward saw of a layer.

    Attributes:
        arities: What each module in the layer returned: 0 for a bare tensor, else the length of the tuple.
        arity: The same of the layer.
        args: The positional arguments of the layer.
        kwargs: The others; None if it was never called.
    """

    arities: dict[str, int]
    arity: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    def fit(self, layer: nn.Module) -> bool:
        """Whether a layer on meta, built otherwise, runs with what this one was given."""
        try:
            with torch.no_grad(), NothingFound():
                layer.to(torch.bfloat16)(*self.args, **(self.kwargs or {}))  # as models are probed
        except Exception:  # whatever a family raises where shapes do not go together
            return False
        return True


class _PassOn(Removed):
    """Returns its input as if it were the result of its work."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return returned(self._onto_residual(hidden_states_of(args, kwargs), args, kwargs), self.arity)


class _Poison(nn.Module):
    """Returns NaN: whoever reads it is found out."""

    def __init__(self, arity: int = 0) -> None:
        super().__init__()
        self.arity = arity

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return returned(torch.full_like(hidden_states_of(args, kwargs), torch.nan), self.arity)


class _Witness(Removed):
    """Stands in the place of a part, and remembers whether it was given NaN."""

    saw_nan = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.saw_nan = self.saw_nan or bool(hidden_states_of(args, kwargs).isnan().any())
        return super().forward(*args, **kwargs)


@dataclass
class LayerTrial:
    """Experiments with one layer.

    Attributes:
        layer: On meta; it is not changed.
        calls: How a forward of the model called it.
        names: Its parts: those that are `attention`, `ffn` and `norm`.
    """

    layer: nn.Module
    calls: Calls
    names: Mapping[str, list[str]]

    def is_identity(self) -> bool:
        """Whether the layer passes its input on, bit for bit, when nothing stands in for all its work."""
        result = self._run({name: self._part(Removed, name) for name in self._parts()})
        return result is not None and torch.equal(result, self._hidden_states())

    def norms_of(self, kind: str) -> tuple[str, ...]:
        """Return the norms that only the sub-blocks of one kind read."""
        removed = {name: self._part(Removed, name) for name in self.names[kind]}
        # norms that are read by nobody even beforehand tell nothing
        read = [norm for norm in self.names["norm"] if not self._is_clean({norm: _Poison()})]
        return tuple(norm for norm in read if self._is_clean({**removed, norm: _Poison()}))

    def are_parallel(self, kind: str) -> bool:
        """Whether no sub-block of a kind reads what another one of it has computed."""
        names = self.names[kind]
        for name in names:
            others = {other: _Witness(self.calls.arities[other], self.residual(other)) for other in names}
            parts = {**others, name: _Poison(self.calls.arities[name])}
            if self._run({part: self._part(Removed, part) for part in self._parts()} | parts) is None:
                return False
            if any(witness.saw_nan for other, witness in others.items() if other != name):
                return False
        return True

    def residual(self, name: str) -> int | None:
        """Return the position at which a part is given the residual stream to add, if it is."""
        parameters = list(inspect.signature(self.layer.get_submodule(name).forward).parameters)
        return parameters.index("residual") if "residual" in parameters else None

    def _parts(self) -> list[str]:
        return [*self.names["attention"], *self.names["ffn"]]

    def _part(self, substitute: type[Removed], name: str) -> nn.Module:
        return substitute(self.calls.arities[name], self.residual(name))

    def _is_clean(self, parts: Mapping[str, nn.Module]) -> bool:
        working = {name: self._part(_PassOn, name) for name in self._parts()}
        result = self._run({**working, **parts})
        return result is not None and not bool(result.isnan().any())

    def _hidden_states(self) -> torch.Tensor:
        shape = hidden_states_of(self.calls.args, self.calls.kwargs or {}).shape
        return torch.linspace(-1, 1, shape.numel()).reshape(shape)

    def _run(self, parts: Mapping[str, nn.Module]) -> torch.Tensor | None:
        """Run a real copy of the layer with some of its parts exchanged; None if it does not run so."""
        trial = copy.deepcopy(self.layer)
        for name, part in parts.items():
            trial.set_submodule(name, part)
        trial = _with_plain_values(trial.to_empty(device="cpu").float().eval())
        hidden_states, kwargs = self._hidden_states(), _zeros_like(dict(self.calls.kwargs or {}))
        args = (hidden_states, *_zeros_like(self.calls.args[1:])) if self.calls.args else ()
        if not args:
            kwargs["hidden_states"] = hidden_states
        try:
            with torch.no_grad():
                output = trial(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return None
        return output[0] if isinstance(output, (tuple, list)) else output


def _zeros_like(value: Any) -> Any:
    """Return arguments that were on meta with zeros in the place of their tensors."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value, device="cpu")
    if isinstance(value, dict):
        return {name: _zeros_like(item) for name, item in value.items()}
    return type(value)(map(_zeros_like, value)) if type(value) in (tuple, list) else value


def _with_plain_values(layer: nn.Module) -> nn.Module:
    """Give what is left of a layer values: its own linear layers pass nothing on, its scales are one."""
    for parameter in layer.parameters():
        parameter.data.fill_(0.5)
    for buffer in layer.buffers():
        buffer.fill_(1)
    for child in layer.children():
        if isinstance(child, nn.Linear):  # what it is given does not count, but its bias would
            child.weight.data.fill_(0)
    return layer
