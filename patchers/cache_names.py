"""Under which names the forward of a family takes and returns its cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Since transformers 5.24 all families use the first one; before, and in remote code, one of the others."""


def cache_name(forward: Callable[..., Any]) -> str | None:
    """Return the name under which a forward takes a cache, None if it takes none.

    Example:
        >>> def forward(input_ids, past_key_values=None): ...
        >>> cache_name(forward)
        'past_key_values'
    """
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_of(output: Mapping[str, Any]) -> Any:
    """Return the cache in the output of a forward, None if there is none.

    Example:
        >>> cache_of({"logits": 1, "past_key_values": 2})
        2
    """
    held = dict(output)  # a ModelOutput would warn of being asked for an old name
    return next((held[name] for name in CACHE_NAMES if held.get(name) is not None), None)
