"""Which tensors of a model are one and the same, by its config and its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def ties_of(config: Any, model_class: type | None, model: Any = None) -> dict[str, str]:
    """Return which name is tied to which: what the config says, in the words of the model's class.

    Args:
        config: Of the model, if it has one.
        model_class: Its class.
        model: The model itself, which may know better where the class speaks in patterns. A partial shard has
            forgotten its ties, and a model whose ends have diverged some of them.
    """
    if not getattr(config, "tie_word_embeddings", False):
        return {}
    said = getattr(model_class, "_tied_weights_keys", None)
    ties = dict(said) if isinstance(said, Mapping) else {}
    return {**ties, **(getattr(model, "all_tied_weights_keys", None) or {})}
