"""What a model makes of a text: its loss on one, and how it goes on with another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from .stage import Stage


def loss(stage: Stage, token_ids: Sequence[int]) -> float | None:
    """Return the mean negative log-likelihood of each token after the first, in nats; all ranks call it.

    Returns:
        None on ranks that have no head.
    """
    ids = torch.tensor([token_ids])
    logits = stage.forward(ids)
    return None if logits is None else cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item()


def complete(
    stage: Stage, token_ids: Sequence[int], *, limit: int, is_done: Callable[[list[int]], bool]
) -> list[int]:
    """Go on with a text, always with the most likely token; all ranks call it.

    Args:
        stage: This rank's stage.
        token_ids: The text so far.
        limit: How many tokens to make at most.
        is_done: Told all tokens made so far, after each; the same on all ranks.

    Returns:
        The tokens made, on every rank.
    """
    cache = DynamicCache(config=stage.shard.config)
    made: list[int] = []
    fresh = torch.tensor([token_ids])
    while len(made) < limit and not is_done(made):
        logits = stage.forward(fresh, cache)
        fresh = stage.share(None if logits is None else logits[:, -1:].argmax(-1))
        made.append(int(fresh))
    return made
