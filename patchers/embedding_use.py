"""Whether a model reads its input embedding for more than the hidden states of the first layer.

Most families do not: then a rank that starts from hidden states of another one needs no embedding. Some hand
the embeddings to every layer (zamba2), derive inputs of single layers from them (gemma3n, gemma4), or look at
the weight itself (llama4). It is tried, with layers that do nothing, and autograd to tell who reads what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from patchers.descriptor import ModelDescriptor
from patchers.families import PLAIN_FAMILIES
from patchers.substitutes import hidden_states_of, returned


def reads_embedding_everywhere(model: PreTrainedModel, descriptor: ModelDescriptor) -> bool:
    """Return whether every stage of a pipeline needs the embedding; yes where it cannot be found out.

    Args:
        model: A whole native model, on meta or with weights; it is not changed.
        descriptor: Its family.
    """
    if model.config.model_type in PLAIN_FAMILIES:
        return False
    uses: list[str] = []
    with _watched(model, descriptor, uses):
        try:
            logits = _forward(model)
        except Exception:
            return True
    return bool(uses) or logits.requires_grad


class _Watched(nn.Module):
    """Stands in for an embedding, and tells of every look at anything but its result."""

    def __init__(self, original: nn.Module, uses: list[str]) -> None:
        super().__init__()
        self.__dict__.update(_original=original, _uses=uses)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattr__(name)
        self._uses.append(name)
        return getattr(self._original, name)

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight: Any = self._original.weight
        shape = (*input_ids.shape, weight.shape[1])
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)


@contextmanager
def _watched(model: PreTrainedModel, descriptor: ModelDescriptor, uses: list[str]) -> Iterator[None]:
    """Put the embedding under watch, and let layers do nothing but tell whether they are given it."""
    layers = list(model.get_submodule(descriptor.layers).children())
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parent, _, name = descriptor.embedding.rpartition(".")
    holder, original = model.get_submodule(parent), model.get_submodule(descriptor.embedding)

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        hidden_states = hidden_states_of(args, kwargs)
        others = [value for value in _tensors((args, kwargs)) if value is not hidden_states]
        if any(value.requires_grad for value in others):
            uses.append("a layer's input")
        return returned(hidden_states.detach(), descriptor.layer_arity)

    for parameter in frozen:
        parameter.requires_grad_(False)
    for layer in layers:
        vars(layer)["forward"] = pass_on
    setattr(holder, name, _Watched(original, uses))
    try:
        yield
    finally:
        setattr(holder, name, original)
        for layer in layers:
            del vars(layer)["forward"]
        for parameter in frozen:
            parameter.requires_grad_(True)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _forward(model: PreTrainedModel) -> torch.Tensor:
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    # a 4-D mask is taken as it is, where computing one would ask meta tensors for values; some want none
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool, device=device)
    with torch.enable_grad():
        try:
            return _logits(model, ids, mask)
        except Exception:
            return _logits(model, ids, None)


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits
