"""What a shard owns, and how tensors get into their places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchers.errors import ConfigError
from sharded_ckpt.distribute.distribution import Slot, global_names
from sharded_ckpt.ties import others_of, partners_of, ties_of


@dataclass(frozen=True)
class _Place:
    """A tensor of the shard and the names under which its modules know it."""

    tensor: Tensor
    names: tuple[str, ...]


class OwnedTensors:
    """The parameters and persistent buffers of a shard, each once, however many names it has.

    Args:
        model: The shard.
        device: Where what is on meta now is to be.
        dtype: What floating-point numbers are cast to; None for what they are.
        ties: Which name is tied to which in the whole model; None for what the model's class and config say.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype | None,
        ties: Mapping[str, str] | None,
    ) -> None:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"dtype={dtype!r}: expected a floating-point one, such as torch.bfloat16")
        self._model, self._device, self._dtype = model, device, dtype
        state = model.state_dict(keep_vars=True)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"{key} of the shard is a {type(value).__name__}; only tensors can be loaded"
                )
        names = global_names(state, "the shard")
        aliases: dict[int, list[str]] = {}
        for key, value in state.items():
            aliases.setdefault(id(value), []).append(key)
        self._places = [_Place(state[keys[0]], tuple(keys)) for keys in aliases.values()]
        partners = partners_of(_ties_said_by(model) if ties is None else ties)
        self.slots = tuple(self._slot(place, names, partners) for place in self._places)

    def _slot(self, place: _Place, names: Mapping[str, str], partners: Mapping[str, list[str]]) -> Slot:
        own = tuple(names[key] for key in place.names)
        tensor = place.tensor
        return Slot(
            own, others_of(own, partners), tuple(tensor.shape), is_floating(tensor), not tensor.is_meta
        )

    def landing(self, index: int, found: torch.dtype) -> Tensor:
        """Return an empty tensor for what is received."""
        place = self._places[index].tensor
        return torch.empty(place.shape, dtype=self._wanted(found), device=self._where(place))

    def convert(self, index: int, tensor: Tensor, copy: bool) -> Tensor:
        """Return a tensor of rank 0 as its own shard takes it; the same memory where that serves."""
        where = self._where(self._places[index].tensor)
        plain = tensor.resolve_conj().resolve_neg().contiguous()
        return plain.to(where, self._wanted(tensor.dtype), copy=copy)

    def fill(self, index: int, value: Tensor) -> None:
        """Put a tensor in its place, under all its names."""
        place = self._places[index]
        if isinstance(place.tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=place.tensor.requires_grad)
            value._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers may not fill it anew
        for name in place.names:
            owner, _, leaf = name.rpartition(".")
            setattr(self._model.get_submodule(owner), leaf, value)

    def _wanted(self, found: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and found.is_floating_point else found

    def _where(self, tensor: Tensor) -> torch.device:
        return self._device if tensor.is_meta else tensor.device


def _ties_said_by(model: nn.Module) -> dict[str, str]:
    """Return the ties that the model's class and config say; a shard may have forgotten its own."""
    while isinstance(inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return ties_of(getattr(model, "config", None), type(model))


def is_floating(tensor: Tensor) -> bool:
    """Return whether a tensor holds real or complex floating-point numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """Return a dtype as "bfloat16"."""
    return None if dtype is None else str(dtype).removeprefix("torch.")
