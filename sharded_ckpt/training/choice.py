"""Choices that may be given by name."""

from __future__ import annotations

from enum import Enum
from typing import Any, TypeVar

from patchers.errors import ConfigError

Choice = TypeVar("Choice", bound=Enum)


def choice_of(kind: type[Choice], value: Any, what: str) -> Choice:
    """Return the member of an enumeration that a member or its value stands for.

    Args:
        kind: The enumeration; its values are strings.
        value: What was given.
        what: What is chosen, as it stands in the error.

    Raises:
        ConfigError: There is no such member.
    """
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise ConfigError(f"{what} is {value!r}; it must be one of {known}") from None
