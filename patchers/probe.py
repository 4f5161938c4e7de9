"""Finding out how a decoder layer works by running it: one forward on meta, then tiny experiments on the CPU.

A layer's attention is the child that is given the cache or the positions; its FFN is the other child with
work of its own. Whether one may be removed is tried, not assumed: its place is taken by zeros, and the layer
must then be the identity; a norm belongs to it alone if filling that norm's output with NaN is seen by
nobody.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from patchers.cache_names import CACHE_NAMES
from patchers.errors import FamilyError
from patchers.layer_trial import Calls, LayerTrial
from patchers.meta import NothingFound
from patchers.substitutes import hidden_states_of, returned

# an FFN looks at one token at a time; whoever is given one of these looks at others
_MIXER_ARGUMENTS = {
    *CACHE_NAMES,
    "layer_past",
    "position_embeddings",
    "position_ids",
    "attention_mask",
    "cache_position",
    "state",
}
_TRIFLES = (nn.Linear, nn.Dropout, nn.Identity)
Structure = tuple[type[nn.Module], tuple[tuple[str, type[nn.Module]], ...]]
"""What tells one kind of layer from another: its class, and the names and classes of its children."""


@dataclass(frozen=True)
class SubBlock:
    """One of the two halves of a decoder layer, its attention or its FFN, or a part of one.

    Attributes:
        name: The module in the layer that it is, such as `self_attn`.
        arity: What it returns: 0 for a bare tensor, else the length of the tuple.
        norms: The norms of the layer that nothing but this sub-block reads: they go when it goes.
        removable: Whether a layer stays exact when nothing stands in the place of this sub-block.
        residual: The position of its argument `residual`, if it adds the residual stream itself.
    """

    name: str
    arity: int
    norms: tuple[str, ...]
    removable: bool
    residual: int | None = None


@dataclass(frozen=True)
class LayerKind:
    """One kind of decoder layer: how to tell it, and what was found out about it.

    Attributes:
        structure: Its class and those of its children.
        arity: What a layer returns: 0 for a bare tensor, else the length of the tuple.
        attention: Its mixers: attention, state-space, linear attention, convolution. Usually one.
        ffn: Its feed-forward parts, dense or experts. Usually one.
        calls: How the model called it.
    """

    structure: Structure
    arity: int
    attention: tuple[SubBlock, ...]
    ffn: tuple[SubBlock, ...]
    calls: Calls = field(compare=False, repr=False)


def probe_layers(model: PreTrainedModel, layers: Iterable[nn.Module]) -> list[LayerKind]:
    """Probe each kind of layer of a model on meta.

    Args:
        model: A model on the meta device, in eval mode; it is not changed.
        layers: Its decoder layers.

    Returns:
        The kinds of layers, in order of appearance.

    Raises:
        FamilyError: The model's forward cannot be traced.
    """
    layers = list(layers)
    kinds: dict[Structure, nn.Module] = {}
    for layer in layers:
        kinds.setdefault(structure_of(layer), layer)
    calls = {layer: Calls({}) for layer in kinds.values()}
    try:
        with _passed_by(layers, kinds, calls):
            _trace(model, calls)
    except FamilyError:  # some families hand things from layer to layer
        _trace(model, calls)
    return [_probe(layer, seen) for layer, seen in calls.items()]


def structure_of(layer: nn.Module) -> Structure:
    """Return the structure of a layer as its own class has built it."""
    return type(layer), tuple((name, type(child)) for name, child in layer.named_children())


def is_structured_as(structure: Structure, other: Structure) -> bool:
    """Whether a layer is of a structure, or of subclasses of what that has."""
    (cls, children), (other_cls, others) = structure, other
    return (
        issubclass(cls, other_cls)
        and [name for name, _ in children] == [name for name, _ in others]
        and all(issubclass(a, b) for (_, a), (_, b) in zip(children, others, strict=True))
    )


def _arity(output: Any) -> int:
    return len(output) if isinstance(output, (tuple, list)) else 0


def called_after_layers(
    model: PreTrainedModel, layers: nn.Module, modules: Mapping[str, nn.Module]
) -> list[str] | None:
    """Return which modules a forward calls after the last layer; None if the model cannot be run on meta."""
    order: list[str | None] = []
    hooks = [layer.register_forward_hook(lambda *_: order.append(None)) for layer in layers.children()]
    hooks += [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in modules.items()
    ]
    try:
        _forward_on_meta(model)
    except FamilyError:
        return None
    finally:
        for hook in hooks:
            hook.remove()
    last = len(order) - order[::-1].index(None)
    return [name for name in order[last:] if name is not None]


@contextmanager
def _passed_by(
    layers: Iterable[nn.Module], kinds: Mapping[Structure, nn.Module], calls: Mapping[nn.Module, Calls]
) -> Iterator[None]:
    """Let layers built like an earlier one return their input: running 90 of a kind tells no more."""
    others = [layer for layer in layers if layer not in calls]
    for layer in others:
        seen = calls[kinds[structure_of(layer)]]
        vars(layer)["forward"] = lambda *args, seen=seen, **kwargs: returned(
            hidden_states_of(args, kwargs), seen.arity
        )
    try:
        yield
    finally:
        for layer in others:
            del vars(layer)["forward"]


def _trace(model: PreTrainedModel, calls: Mapping[nn.Module, Calls]) -> None:
    """Run the model once, and note what its layers are given and return."""
    hooks = [hook for layer, seen in calls.items() for hook in _watch(layer, seen)]
    try:
        _forward_on_meta(model)
    finally:
        for hook in hooks:
            hook.remove()


def _forward_on_meta(model: PreTrainedModel) -> None:
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    # a 4-D mask is taken as it is, where computing one would ask meta tensors for values; some want none, and
    # some (falcon with alibi) one that says which tokens are there
    masks = (torch.zeros(1, 1, 2, 2, dtype=torch.bool, device="meta"), None, torch.ones_like(ids))
    nested = model.config.get_text_config(decoder=True) is not model.config
    decoder = model.get_decoder() if nested else model  # only that part is run which has the layers
    failures = []
    for mask in masks:
        try:
            with torch.no_grad(), NothingFound():
                decoder(input_ids=ids, attention_mask=mask, use_cache=False)
            return
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    raise FamilyError(f"{type(model).__name__} cannot be traced on the meta device: {'; '.join(failures)}")


def _watch(layer: nn.Module, seen: Calls) -> list[Any]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.args, seen.kwargs = args, dict(kwargs)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.arity = _arity(output)

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    for name, child in layer.named_modules():
        if len(name) > 0 and name.count(".") < 2:
            hooks.append(
                child.register_forward_hook(
                    lambda _m, _a, out, name=name: seen.arities.update({name: _arity(out)})
                )
            )
    return hooks


def _probe(layer: nn.Module, calls: Calls) -> LayerKind:
    if calls.kwargs is None:
        raise FamilyError(f"the forward of the model never calls its {type(layer).__name__}")
    names = _classify(layer, calls)
    trial = LayerTrial(layer, calls, names)
    identity = trial.is_identity()
    inner = {**names, "attention": _inner_mixers(layer, names["attention"], calls)}
    if not identity and inner != names:
        inner_trial = LayerTrial(layer, calls, inner)
        identity = inner_trial.is_identity()
        trial = inner_trial if identity else trial
    attention, ffn = (
        tuple(
            SubBlock(
                name,
                calls.arities[name],
                trial.norms_of(kind),
                identity and (_is_chain(layer, trial.names[kind]) or trial.are_parallel(kind)),
                trial.residual(name),
            )
            for name in trial.names[kind]
        )
        for kind in ("attention", "ffn")
    )
    return LayerKind(structure_of(layer), calls.arity, attention, ffn, calls)


def _is_mixer(module: nn.Module) -> bool:
    return bool(_MIXER_ARGUMENTS & set(inspect.signature(module.forward).parameters))


def _is_norm(module: nn.Module) -> bool:
    matrices = any(parameter.dim() > 1 for parameter in module.parameters())
    return "norm" in type(module).__name__.lower() and not matrices


def _classify(layer: nn.Module, calls: Calls) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {"attention": [], "ffn": [], "norm": []}
    for name, child in layer.named_children():
        if name not in calls.arities or isinstance(child, _TRIFLES):
            continue
        if _is_mixer(child):
            names["attention"].append(name)
        elif _is_norm(child):
            names["norm"].append(name)
        elif any(parameter.dim() > 1 for parameter in child.parameters()):
            names["ffn"].append(name)
    linears = [name for name, child in layer.named_children() if isinstance(child, nn.Linear)]
    if not names["ffn"] and _is_chain(layer, linears) and calls.arities.keys() >= set(linears):
        names["ffn"] = linears
    return names


def _is_chain(layer: nn.Module, names: list[str]) -> bool:
    """Whether these are the two linear layers of an FFN that has no module of its own (opt)."""
    parts = [layer.get_submodule(name) for name in names]
    if len(parts) != 2 or not all(isinstance(part, nn.Linear) for part in parts):
        return False
    first, second = (tuple(part.get_parameter("weight").shape) for part in parts)
    return first == second[::-1]


def _inner_mixers(layer: nn.Module, names: list[str], calls: Calls) -> list[str]:
    """Return, in the place of a child that holds a mixer together with norms, the mixer in it."""
    found = []
    for name in names:
        inside = [
            f"{name}.{inner}"
            for inner, child in layer.get_submodule(name).named_children()
            if _is_mixer(child) and f"{name}.{inner}" in calls.arities
        ]
        found.append(inside[0] if len(inside) == 1 else name)
    return found
