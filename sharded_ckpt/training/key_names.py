"""Names of tensors in memory and in the files of others: prefixes, and what peft calls a DoRA magnitude.

The functions change the dict that they are given, as those of NeMo Automodel do whose names they bear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, TypeVar

from patchers.errors import CheckpointError
from patchers.names import fold

T = TypeVar("T")

_PREFIX: Final = "model."
PEFT_PREFIX: Final = "base_model.model."
"""What peft puts before every name of the model inside."""

_MAGNITUDE = re.compile(r"\.lora_magnitude$")
_MAGNITUDE_ON_DISK = re.compile(r"\.lora_magnitude_vector(?:\.default(?:\.weight)?)?$")


def renamed(state: Mapping[str, T], rename: Callable[[str], str]) -> dict[str, T]:
    """Return a dict under other names, in the same order.

    Raises:
        CheckpointError: Two names become one.

    Example:
        >>> renamed({"a": 1, "b": 2}, str.upper)
        {'A': 1, 'B': 2}
    """
    result: dict[str, T] = {}
    clash: list[str] = []
    for key, value in state.items():
        name = rename(key)
        if name in result:
            clash.append(name)
        result[name] = value
    if clash:
        raise CheckpointError(f"several tensors would be called {fold(clash)}: nothing was renamed")
    return result


def _drop_outer_prefix(sd: dict[str, Any], prefix: str = _PREFIX) -> None:
    """Remove `prefix`, once, from the begin of every key that has it, in place.

    Raises:
        CheckpointError: Two keys become one; nothing is changed then.

    Example:
        >>> state = {"model.model.norm.weight": 1, "lm_head.weight": 2}
        >>> _drop_outer_prefix(state)
        >>> state
        {'model.norm.weight': 1, 'lm_head.weight': 2}
    """
    _replace(sd, renamed(sd, lambda key: key.removeprefix(prefix)))


def _add_outer_prefix(
    sd: dict[str, Any], prefix: str = _PREFIX, skip_keys: Collection[str] | None = None
) -> None:
    """Put `prefix`, once, before every key that does not begin with it, in place.

    Args:
        sd: A state dict.
        prefix: What to put there.
        skip_keys: Keys that stay as they are.

    Raises:
        CheckpointError: Two keys become one; nothing is changed then.
    """
    skipped = frozenset(skip_keys or ())
    _replace(sd, renamed(sd, lambda key: key if key in skipped or key.startswith(prefix) else prefix + key))


def _rename_dora_keys_to_hf(sd: dict[str, Any]) -> None:
    """Call `<module>.lora_magnitude` what it is called in peft's files, in place.

    Example:
        >>> state = {"q_proj.lora_magnitude": 1, "q_proj.lora_A.weight": 2}
        >>> _rename_dora_keys_to_hf(state)
        >>> list(state)
        ['q_proj.lora_magnitude_vector', 'q_proj.lora_A.weight']
    """
    _replace(sd, renamed(sd, lambda key: _MAGNITUDE.sub(".lora_magnitude_vector", key)))


def _rename_dora_keys_from_hf(sd: dict[str, Any]) -> None:
    """Undo `_rename_dora_keys_to_hf`, in place; also for names with `.default.weight`, as once written."""
    _replace(sd, renamed(sd, lambda key: _MAGNITUDE_ON_DISK.sub(".lora_magnitude", key)))


def _replace(sd: dict[str, Any], content: dict[str, Any]) -> None:
    sd.clear()
    sd.update(content)
