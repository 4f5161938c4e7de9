"""Finding out how a decoder layer works by running it: one forward on meta, then tiny experiments on the CPU.

A layer's attention is the child that is given the cache or the positions; its FFN is the other child with
work of its own. Whether one may be removed is tried, not assumed: its place is taken by zeros, and the layer
must then be the identity; a norm belongs to it alone if filling that norm's output with NaN is seen by
nobody.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from patchers.errors import FamilyError
from patchers.substitutes import NoFFN, hidden_states_of, returned

_MIXER_ARGUMENTS = {"past_key_values", "cache_params", "layer_past", "position_embeddings"}
_TRIFLES = (nn.Linear, nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class SubBlock:
    """One of the two halves of a decoder layer: its attention, or its FFN.

    Attributes:
        name: The layer's attribute that holds it, such as `self_attn`.
        arity: What it returns: 0 for a bare tensor, else the length of the tuple.
        norms: The norms of the layer that nothing but this sub-block reads: they go when it goes.
        removable: Whether a layer stays exact when zeros stand in the place of this sub-block.
    """

    name: str
    arity: int
    norms: tuple[str, ...]
    removable: bool


@dataclass(frozen=True)
class LayerProbe:
    """What was found out about one layer: its return form, its attentions and its FFNs."""

    arity: int
    attention: tuple[SubBlock, ...]
    ffn: tuple[SubBlock, ...]


@dataclass
class _Calls:
    """What one traced forward saw of a layer."""

    arities: dict[str, int]
    arity: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None


def probe_layers(model: PreTrainedModel, layers: Iterable[nn.Module]) -> list[LayerProbe]:
    """Probe each layer of a model on meta.

    Args:
        model: A model on the meta device, in eval mode; it is not changed.
        layers: Its decoder layers.

    Returns:
        One probe a structure of layers (class and children), in order of appearance.

    Raises:
        FamilyError: The model's forward cannot be traced.
    """
    layers = list(layers)
    kinds: dict[Any, nn.Module] = {}
    for layer in layers:
        kinds.setdefault(_structure(layer), layer)
    calls = {layer: _Calls({}) for layer in kinds.values()}
    try:
        with _passed_by(layers, kinds, calls):
            _trace(model, calls)
    except FamilyError:  # some families hand things from layer to layer
        _trace(model, calls)
    return [_probe(layer, seen) for layer, seen in calls.items()]


def _structure(layer: nn.Module) -> Any:
    return type(layer), tuple((name, type(child)) for name, child in layer.named_children())


def _arity(output: Any) -> int:
    return len(output) if isinstance(output, (tuple, list)) else 0


@contextmanager
def _passed_by(
    layers: Iterable[nn.Module], kinds: Mapping[Any, nn.Module], calls: Mapping[nn.Module, _Calls]
) -> Iterator[None]:
    """Let layers built like an earlier one return their input: running 90 of a kind tells no more."""
    others = [layer for layer in layers if layer not in calls]
    for layer in others:
        seen = calls[kinds[_structure(layer)]]
        vars(layer)["forward"] = lambda *args, seen=seen, **kwargs: returned(
            hidden_states_of(args, kwargs), seen.arity
        )
    try:
        yield
    finally:
        for layer in others:
            del vars(layer)["forward"]


def _trace(model: PreTrainedModel, calls: Mapping[nn.Module, _Calls]) -> None:
    """Run the model once, and note what its layers are given and return."""
    hooks = [hook for layer, seen in calls.items() for hook in _watch(layer, seen)]
    try:
        _forward_on_meta(model)
    finally:
        for hook in hooks:
            hook.remove()


def _forward_on_meta(model: PreTrainedModel) -> None:
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    # a 4-D mask is taken as it is, where computing one would ask meta tensors for values; some want none
    masks = (torch.zeros(1, 1, 2, 2, dtype=torch.bool, device="meta"), None)
    nested = model.config.get_text_config(decoder=True) is not model.config
    decoder = model.get_decoder() if nested else model  # only that part is run which has the layers
    failures = []
    for mask in masks:
        try:
            with torch.no_grad():
                decoder(input_ids=ids, attention_mask=mask, use_cache=False)
            return
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    raise FamilyError(f"{type(model).__name__} cannot be traced on the meta device: {'; '.join(failures)}")


def _watch(layer: nn.Module, seen: _Calls) -> list[Any]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.args, seen.kwargs = args, dict(kwargs)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.arity = _arity(output)

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    for name, child in layer.named_children():
        hooks.append(
            child.register_forward_hook(
                lambda _m, _a, out, name=name: seen.arities.update({name: _arity(out)})
            )
        )
    return hooks


def _probe(layer: nn.Module, calls: _Calls) -> LayerProbe:
    if calls.kwargs is None:
        raise FamilyError(f"the forward of the model never calls its {type(layer).__name__}")
    names = _classify(layer, calls)
    identity = _is_identity(layer, calls, names)
    parts = {
        kind: tuple(
            SubBlock(name, calls.arities[name], _norms_of(layer, calls, names, kind), identity)
            for name in names[kind]
        )
        for kind in ("attention", "ffn")
    }
    return LayerProbe(calls.arity, parts["attention"], parts["ffn"])


def _classify(layer: nn.Module, calls: _Calls) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {"attention": [], "ffn": [], "norm": []}
    for name, child in layer.named_children():
        if name not in calls.arities or isinstance(child, _TRIFLES):
            continue
        if _MIXER_ARGUMENTS & set(inspect.signature(child.forward).parameters):
            names["attention"].append(name)
        elif "norm" in type(child).__name__.lower():
            names["norm"].append(name)
        elif any(True for _ in child.parameters()):
            names["ffn"].append(name)
    return names


class _PassOn(nn.Module):
    """Returns its input as if it were the result of its work."""

    def __init__(self, arity: int) -> None:
        super().__init__()
        self.arity = arity

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return returned(hidden_states_of(args, kwargs), self.arity)


class _Poison(nn.Module):
    """Returns NaN: whoever reads it is found out."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.full_like(hidden_states, torch.nan)


def _is_identity(layer: nn.Module, calls: _Calls, names: dict[str, list[str]]) -> bool:
    """Whether the layer passes its input on, bit for bit, when zeros stand in for all its work."""
    zeros = {name: NoFFN(calls.arities[name]) for name in names["attention"] + names["ffn"]}
    result = _run_with(layer, calls, zeros)
    return result is not None and torch.equal(result, _hidden_states(calls))


def _norms_of(layer: nn.Module, calls: _Calls, names: dict[str, list[str]], kind: str) -> tuple[str, ...]:
    """Return the norms that only the sub-blocks of one kind read."""
    other = "ffn" if kind == "attention" else "attention"
    parts: dict[str, nn.Module] = {name: NoFFN(calls.arities[name]) for name in names[kind]}
    parts.update({name: _PassOn(calls.arities[name]) for name in names[other]})
    # norms that are read by nobody even beforehand tell nothing
    read = [norm for norm in names["norm"] if not _is_clean(layer, calls, {norm: _Poison()}, names)]
    return tuple(norm for norm in read if _is_clean(layer, calls, {**parts, norm: _Poison()}, names))


def _is_clean(
    layer: nn.Module, calls: _Calls, parts: dict[str, nn.Module], names: dict[str, list[str]]
) -> bool:
    working = {name: _PassOn(calls.arities[name]) for name in names["attention"] + names["ffn"]}
    result = _run_with(layer, calls, {**working, **parts})
    return result is not None and not bool(result.isnan().any())


def _hidden_states(calls: _Calls) -> torch.Tensor:
    shape = hidden_states_of(calls.args, calls.kwargs or {}).shape
    return torch.linspace(-1, 1, shape.numel()).reshape(shape)


def _run_with(layer: nn.Module, calls: _Calls, parts: Mapping[str, nn.Module]) -> torch.Tensor | None:
    """Run a real copy of a layer with some of its children exchanged; None if it does not run so."""
    trial = copy.deepcopy(layer)
    for name, part in parts.items():
        setattr(trial, name, part)
    trial = trial.to_empty(device="cpu").float().eval()
    for parameter in trial.parameters():
        parameter.data.fill_(0.5)
    hidden_states, kwargs = _hidden_states(calls), dict(calls.kwargs or {})
    args = (hidden_states, *calls.args[1:]) if calls.args else ()
    if not args:
        kwargs["hidden_states"] = hidden_states
    try:
        with torch.no_grad():
            output = trial(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    return output[0] if isinstance(output, (tuple, list)) else output
