"""A cache with room holds what transformers' own holds, whatever is done to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import tiny_config, tiny_model
from transformers import Cache, DynamicCache

from patchers.cache_names import cache_name
from sharded_ckpt.pipeline.cache import RoomyLayer, with_room

SIZES = [(3, 2), (1, 3)]  # heads and size of keys, of values


def states(tokens: int, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (torch.randn(batch, heads, tokens, size) for heads, size in SIZES)
    return keys, values


def grow(caches: list[Cache], tokens: int, batch: int = 4) -> None:
    new = states(tokens, batch)
    results = [cache.update(*new, layer_idx=1) for cache in caches]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert len({cache.get_seq_length(1) for cache in caches}) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1, 3])),
        lambda cache: cache.reset(),
    ],
)
def test_it_holds_what_a_dynamic_cache_holds(change: Any) -> None:
    config = tiny_config()
    caches: list[Cache] = [with_room(DynamicCache(config=config)), DynamicCache(config=config)]
    for tokens in (5, 1, 250, 1, 1, 300):
        grow(caches, tokens)
    for cache in caches:
        change(cache)
    for tokens in (1, 2):
        grow(caches, tokens)


def test_a_token_more_copies_nothing() -> None:
    layer = RoomyLayer()
    layer.update(*states(5))
    place = layer.keys.data_ptr()
    for _ in range(200):
        layer.update(*states(1))
    assert layer.keys.data_ptr() == place
    assert layer.keys.shape == (4, 3, 205, 2)


def test_what_a_cache_already_holds_stays() -> None:
    cache = DynamicCache(config=tiny_config())
    cache.update(*states(3), layer_idx=0)
    held = cache.layers[0]
    assert with_room(cache).layers[0] is held
    assert cache.get_seq_length() == 3


def test_generating_with_it_gives_the_same_logits() -> None:
    model, ids = tiny_model(), torch.arange(4, 16).reshape(2, 6)
    caches = [with_room(DynamicCache(config=model.config)), DynamicCache(config=model.config)]
    name = cache_name(model.forward)
    with torch.no_grad():
        for start, end in [(0, 4), (4, 5), (5, 6)]:
            ours, theirs = (model(ids[:, start:end], **{name: cache}).logits for cache in caches)
            assert torch.equal(ours, theirs)
