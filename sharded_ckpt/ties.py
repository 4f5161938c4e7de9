"""Which tensors of a model are one and the same, by its config and its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_OF_THE_WHOLE = "_ties_of_the_whole"


def remember_ties(model: Any, ties: Mapping[str, str]) -> None:
    """Note on a partial shard what is tied in the whole model."""
    vars(model)[_OF_THE_WHOLE] = {**ties, **vars(model).get(_OF_THE_WHOLE, {})}


def ties_of(config: Any, model_class: type | None, model: Any = None) -> dict[str, str]:
    """Return which name is tied to which: what the config says, in the words of the model's class.

    Args:
        config: Of the model, if it has one.
        model_class: Its class.
        model: The model itself, which may know better where the class speaks in patterns. A partial shard
            remembers those of the whole; a model whose ends have diverged has forgotten some of them.
    """
    if not getattr(config, "tie_word_embeddings", False):
        return {}
    said = getattr(model_class, "_tied_weights_keys", None)
    ties = dict(said) if isinstance(said, Mapping) else {}
    whole = getattr(model, _OF_THE_WHOLE, None) or {}
    return {**ties, **whole, **(getattr(model, "all_tied_weights_keys", None) or {})}


def partners_of(ties: Mapping[str, str]) -> dict[str, list[str]]:
    """Return, for each tied name, the names that stand for the same tensor.

    Example:
        >>> partners_of({"lm_head.weight": "embed.weight"})
        {'lm_head.weight': ['embed.weight'], 'embed.weight': ['lm_head.weight']}
    """
    partners: dict[str, list[str]] = {}
    for target, source in ties.items():
        partners.setdefault(target, []).append(source)
        partners.setdefault(source, []).append(target)
    return partners


def others_of(names: Sequence[str], partners: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the names that stand for the same tensor as some names do, without these.

    Args:
        names: Of one tensor.
        partners: What `partners_of` gave.
    """
    others = dict.fromkeys(other for name in names for other in partners.get(name, ()))
    return tuple(other for other in others if other not in names)
