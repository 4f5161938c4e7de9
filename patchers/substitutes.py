"""What stands in the place of a submodule that was removed, replaced by a linear layer, or is not owned.

A removed attention still counts tokens. `Cache.get_seq_length()` and the mask code ask one layer's cache slot
for all; were that the slot of a removed attention, it would say 0 for ever and cached decoding would be
silently wrong. So every substitute of an attention writes a placeholder of `[batch, 1, tokens, 1]` into its
slot: two numbers per token and layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from patchers.errors import PartialModelError


def returned(hidden_states: torch.Tensor, arity: int) -> Any:
    """Return `hidden_states` in the form in which a family's module returns it.

    Args:
        hidden_states: The tensor that the caller will use.
        arity: 0 for a bare tensor, else the length of the tuple that it heads.
    """
    return hidden_states if arity == 0 else (hidden_states, *[None] * (arity - 1))


def hidden_states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the hidden states among the arguments of a call: the first one, or the one of that name."""
    hidden_states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden_states


def count_tokens(layer_idx: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Write a placeholder for the tokens of a call into a layer's cache slot, if the call carries a cache.

    Args:
        layer_idx: The layer's true index in the model.
        args: The positional arguments of the call.
        kwargs: The others.
    """
    batch, tokens = hidden_states_of(args, kwargs).shape[-3:-1]  # some families put one dimension before them
    for cache in (value for value in (*args, *kwargs.values()) if isinstance(value, Cache)):
        if not _counts(cache, layer_idx):
            continue
        keys, values = (
            hidden_states_of(args, kwargs).new_zeros(batch, heads, tokens, size)
            for heads, size in _forms(cache, layer_idx)
        )
        cache.update(keys, values, layer_idx)


def _forms(cache: Cache, layer_idx: int) -> list[tuple[int, int]]:
    """Return heads and size of keys and of values: what a slot has room for, else the least."""
    slot = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    held = [getattr(slot, name, None) for name in ("keys", "values")]
    return [(1, 1) if room is None or room.ndim != 4 else (room.shape[1], room.shape[3]) for room in held]


def _counts(cache: Cache, layer_idx: int) -> bool:
    """Whether a slot holds keys and values: not that of a linear attention, nor one that another feeds."""
    if layer_idx >= len(cache.layers):
        return True  # it will be made
    slot = cache.layers[layer_idx]
    return isinstance(slot, CacheLayerMixin) and not isinstance(slot, DummyLayer)


class Removed(nn.Module):
    """A removed part of a layer: adds nothing to the residual stream.

    Args:
        arity: What the part returned: 0 for a bare tensor, else the length of the tuple.
        residual: Where the part was given the residual stream, if it added that itself: the position of its
            argument `residual`. It is then passed on.
    """

    def __init__(self, arity: int, residual: int | None = None) -> None:
        super().__init__()
        self.arity, self.residual = arity, residual

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros like the hidden states `[batch, tokens, hidden]`, or the residual stream."""
        return returned(self._onto_residual(None, args, kwargs), self.arity)

    def _onto_residual(
        self, result: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        if self.residual is None:
            return torch.zeros_like(hidden_states_of(args, kwargs)) if result is None else result
        passed: torch.Tensor = args[self.residual] if len(args) > self.residual else kwargs["residual"]
        return passed if result is None else passed + result


class NoFFN(Removed):
    """A removed FFN."""


class LinearFFN(Removed):
    """An FFN replaced by one linear layer, `linear_mlp.weight` of shape `(hidden, hidden)`."""

    def __init__(self, hidden_size: int, arity: int, residual: int | None = None) -> None:
        super().__init__(arity, residual)
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the linear image of the hidden states `[batch, tokens, hidden]`."""
        image = self.linear_mlp(hidden_states_of(args, kwargs))
        return returned(self._onto_residual(image, args, kwargs), self.arity)


class NoAttention(Removed):
    """A removed attention: it still counts tokens."""

    def __init__(self, layer_idx: int, arity: int, residual: int | None = None) -> None:
        super().__init__(arity, residual)
        self.layer_idx = layer_idx

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros like the hidden states `[batch, tokens, hidden]`, or the residual stream."""
        count_tokens(self.layer_idx, args, kwargs)
        return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        """Say which layer this is."""
        return f"layer_idx={self.layer_idx}"


class LinearAttention(NoAttention):
    """An attention replaced by one linear layer, `linear_attn.weight` of shape `(hidden, hidden)`."""

    def __init__(self, hidden_size: int, layer_idx: int, arity: int, residual: int | None = None) -> None:
        super().__init__(layer_idx, arity, residual)
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the linear image of the hidden states `[batch, tokens, hidden]`."""
        count_tokens(self.layer_idx, args, kwargs)
        image = self.linear_attn(hidden_states_of(args, kwargs))
        return returned(self._onto_residual(image, args, kwargs), self.arity)


class NoNorm(nn.Module):
    """The norm of a removed sub-block: passes on what it is given, which nobody reads."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return `hidden_states`."""
        return hidden_states


class Unowned(nn.Module):
    """The stub of a module that this shard does not own: it holds no storage.

    The meta module that it replaces is kept aside, outside of the module tree, because some families read
    plain attributes of every layer (`attention_type`, `block_type`). Called, it raises, until a pipeline
    stage has armed it (`armed`): then it does what lets the family's own forward run past it.
    """

    def __init__(self, original: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["_original"] = original
        self.name, self.armed = name, False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_original" not in self.__dict__:
                raise
            return getattr(self.__dict__["_original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass the input on when armed.

        Raises:
            PartialModelError: This shard is being used as if it were the whole model.
        """
        if not self.armed:
            raise PartialModelError(
                f"this shard does not own {self.name}, so it cannot be called like a whole model. Run it as "
                "a stage of a pipeline over the ranks, or load the whole model: "
                "load_and_shard_model(descriptor, path, owned_block_indexes=set(range(num_hidden_layers)))"
            )
        return self.pass_on(*args, **kwargs)

    def pass_on(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument."""
        return hidden_states_of(args, kwargs)

    def extra_repr(self) -> str:
        """Say what is not owned."""
        return self.name


class UnownedBlock(Unowned):
    """The stub of a block: armed, it passes the hidden states on and counts tokens in its cache slot.

    Attributes:
        delivery: Where hidden states come from that another rank computed, to be returned in the place of the
            input. What a block returns is the one place to exchange them at: gradient checkpointing runs a
            block a second time, without whoever changed its input.

    Args:
        original: The block on meta.
        name: Its dotted name.
        layer_idx: Its true index in the model.
        arity: What it returns (`returned`), or a function that says so when it is needed.
    """

    def __init__(
        self, original: nn.Module, name: str, layer_idx: int, arity: int | Callable[[], int]
    ) -> None:
        super().__init__(original, name)
        self.layer_idx, self.arity = layer_idx, arity
        self.delivery: Callable[[torch.Tensor], torch.Tensor] | None = None

    def pass_on(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states in the layer's own return form."""
        if getattr(self, "block_type", None) != "linear_attention":  # minimax's cache has slots for all kinds
            count_tokens(self.layer_idx, args, kwargs)
        arity = self.arity() if callable(self.arity) else self.arity
        hidden_states = hidden_states_of(args, kwargs)
        if self.delivery is not None:
            hidden_states = self.delivery(hidden_states)
        return returned(hidden_states, arity)


class UnownedEmbedding(Unowned):
    """The stub of the input embedding: armed, it gives zeros, for a received tensor to replace.

    Attributes:
        dtype: That of the zeros, from which the model derives those of its masks and rotary embeddings.
    """

    def __init__(self, original: nn.Module, name: str) -> None:
        super().__init__(original, name)
        self.dtype: torch.dtype = self.weight.dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> UnownedEmbedding:
        """Follow the model into another dtype (`model.to`), which passes by what is no parameter of it."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        return self

    def pass_on(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return zeros `[batch, tokens, hidden]` in the embedding's dtype, on the ids' device."""
        return torch.zeros(*input_ids.shape, self.weight.shape[1], dtype=self.dtype, device=input_ids.device)


@contextmanager
def armed(model: nn.Module) -> Iterator[None]:
    """Let the stubs of a partial shard be called, as a pipeline stage does around its own forward."""
    with all_armed([module for module in model.modules() if isinstance(module, Unowned)]):
        yield


@contextmanager
def all_armed(stubs: Iterable[Unowned]) -> Iterator[None]:
    """Let stubs be called; those that already could be stay so."""
    stubs = [stub for stub in stubs if not stub.armed]
    try:
        for stub in stubs:
            stub.armed = True
        yield
    finally:
        for stub in stubs:
            stub.armed = False
