"""A KV cache that does not copy all that it holds for every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_STEP = 256
"""Tokens by which a slot's room grows at a time."""


class RoomyLayer(DynamicLayer):
    """A cache slot with room for more tokens: transformers' own makes a longer tensor for every one of them.

    `keys` and `values` are views, `(batch, heads, tokens, head_dim)`, of the beginning of what is reserved.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values, and return all of them."""
        if self.keys is None or self.values is None or not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms = [key_states[..., :0, :], value_states[..., :0, :]]
            held = self._rooms
        else:
            held = [self.keys, self.values]
        length = held[0].shape[-2]
        new = length + key_states.shape[-2]
        if new > self._rooms[0].shape[-2] or any(map(_is_elsewhere, held, self._rooms)):
            self._rooms = [_with_room(tensor, new) for tensor in held]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., length:new, :] = states
        keys, values = (room[..., :new, :] for room in self._rooms)
        self.keys, self.values = keys, values
        return keys, values


def with_room(cache: Any) -> Any:
    """Give an empty `DynamicCache` room to grow where it would copy; any other cache stays as it is."""
    if type(cache) is DynamicCache:
        cache.layers = [RoomyLayer() if _is_plain_and_empty(layer) else layer for layer in cache.layers]
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = RoomyLayer
    return cache


def _is_plain_and_empty(layer: Any) -> bool:
    return type(layer) is DynamicLayer and not layer.is_initialized


def _is_elsewhere(held: torch.Tensor, room: torch.Tensor) -> bool:
    """Whether someone has put another tensor in the place of the view (beam search does)."""
    return held.data_ptr() != room.data_ptr()


def _with_room(held: torch.Tensor, tokens: int) -> torch.Tensor:
    *front, _, size = held.shape
    room = held.new_empty(*front, -(-tokens // _STEP) * _STEP, size)
    room[..., : held.shape[-2], :] = held
    return room
