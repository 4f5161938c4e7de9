"""How a caller says what a child keeps of each block."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

from patchers.errors import BlockConfigError, ConfigError
from patchers.names import fold_indices


@dataclass(frozen=True, eq=False)
class Scores:
    """What is kept in one block: the units with the highest scores, in ascending order; of equal the first.

    Args:
        values: One score for each unit of the parent's block: an FFN channel, a KV head, a query head. A
            sequence of numbers, or a tensor of one dimension.
    """

    values: Any


@dataclass(frozen=True, eq=False)
class Indexes:
    """What is kept in one block: these units of the parent, in ascending order.

    Args:
        values: As many as the child has: a sequence of whole numbers, or a tensor of one dimension.
    """

    values: Any


Choice: TypeAlias = "str | Scores | Indexes"
Choices: TypeAlias = "Choice | Sequence[Choice] | Mapping[int, Choice]"
"""One choice for all blocks, or one for each."""


@dataclass(frozen=True)
class Rules:
    """How a child is made of its parent.

    Args:
        ffn_channels: Which channels a narrower FFN keeps.
        kv_heads: Which KV heads an attention with fewer of them keeps, or what is made of them.
        linear: What a linear layer is that takes the place of an attention or an FFN.
        query_heads: Which query heads stay where a KV head shall have fewer of them; None says nothing of it.
    """

    ffn_channels: Choices = "norm"
    kv_heads: Choices = "mean"
    linear: str = "product"
    query_heads: Choices | None = None


def check_choices(choices: Any, count: int, field: str, names: Collection[str]) -> None:
    """Check that choices are of a form that `choice_of` understands, also where no block needs them.

    Args:
        choices: What the caller gave.
        count: How many blocks there are.
        field: What the argument is called in errors.
        names: The rules that there are.

    Raises:
        ConfigError: They are something else, or are said of blocks that do not exist.
    """
    for choice in _said(choices, count, field):
        if isinstance(choice, str):
            check_name(choice, field, names)
        elif not isinstance(choice, Scores | Indexes):
            raise ConfigError(f"{field} has an entry {choice!r:.200}: {_forms(field)}")


def check_name(name: Any, field: str, names: Collection[str]) -> None:
    """Check that there is a rule of a name.

    Raises:
        ConfigError: There is none.
    """
    if name not in names:
        raise ConfigError(f"{field}={name!r} is not a rule that is known: {', '.join(map(repr, names))}")


def _said(choices: Any, count: int, field: str) -> Iterable[Any]:
    if isinstance(choices, str | Scores | Indexes):
        return [choices]
    if not isinstance(choices, Mapping | Sequence):
        raise ConfigError(f"{field}={choices!r:.200}: {_forms(field)}")
    if isinstance(choices, Sequence) and len(choices) != count:
        raise ConfigError(f"{field} has {len(choices)} entries for {count} blocks; give one for each block")
    if isinstance(choices, Mapping) and (wrong := [key for key in choices if key not in range(count)]):
        raise ConfigError(f"{field} has entries for {wrong}; the blocks are {fold_indices(range(count))}")
    return choices.values() if isinstance(choices, Mapping) else choices


def _forms(field: str) -> str:
    return (
        f"an entry is the name of a rule, Scores(…) or Indexes(…); {field} is one for all blocks, or a "
        "sequence or a mapping with one for each block"
    )


def choice_of(choices: Choices, index: int, field: str, change: str) -> Choice:
    """Return the choice for a block that needs one.

    Raises:
        BlockConfigError: A mapping does not say.
    """
    if isinstance(choices, str | Scores | Indexes):
        return choices
    if isinstance(choices, Mapping) and index not in choices:
        raise BlockConfigError(
            f"{change}, and {field} does not say how; it has entries for {sorted(choices)}"
        )
    return choices[index]


def kept_units(choice: Scores | Indexes, total: int, keep: int, field: str) -> tuple[int, ...]:
    """Return the units that a block keeps, in ascending order.

    Args:
        choice: What the caller gave for the block.
        total: How many units the parent's block has.
        keep: How many the child's has.
        field: What the argument is called in errors.

    Raises:
        BlockConfigError: There are not as many scores as units, or not as many indexes as are kept, or an
            index or a score is none.

    Example:
        >>> kept_units(Scores([0.5, 2, 0.5, 1]), total=4, keep=3, field="kv_heads")
        (0, 1, 3)
    """
    if isinstance(choice, Scores):
        return largest(scores_of(choice, total, field), keep)
    return _checked_indexes(_plain(choice.values, field), total, keep, field)


def scores_of(choice: Scores, total: int, field: str) -> list[float]:
    """Return the scores of all units of a block, checked.

    Raises:
        BlockConfigError: There are not as many as units, or one is no number.
    """
    return _checked_scores(_plain(choice.values, field), total, field)


def largest(scores: Sequence[float], keep: int) -> tuple[int, ...]:
    """Return the indexes of the largest scores, in ascending order; of equal ones the first.

    Example:
        >>> largest([1.0, 3.0, 1.0, 2.0], keep=3)
        (0, 1, 3)
    """
    return tuple(sorted(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:keep]))


def _plain(values: Any, field: str) -> list[Any]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise BlockConfigError(f"{field}: expected a sequence of numbers, found {values!r:.200}")
    return list(values)


def _checked_scores(values: list[Any], total: int, field: str) -> list[float]:
    if len(values) != total:
        raise BlockConfigError(
            f"{field} has {len(values)} scores for the parent's {total}; give one for each"
        )
    wrong = [index for index, value in enumerate(values) if not _is_number(value) or math.isnan(value)]
    if wrong:
        raise BlockConfigError(
            f"{field} has scores that are no numbers at {fold_indices(wrong)}: {values[wrong[0]]!r:.60}"
        )
    return values


def _checked_indexes(values: list[Any], total: int, keep: int, field: str) -> tuple[int, ...]:
    wrong = [
        value
        for value in values
        if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < total
    ]
    if wrong or len(set(values)) != len(values):
        what = f"{wrong[0]!r:.60}, which is none of 0-{total - 1}" if wrong else "an index twice"
        raise BlockConfigError(f"{field} has {what}")
    if len(values) != keep:
        raise BlockConfigError(f"{field} names {len(values)} to keep, but the child has {keep}")
    return tuple(sorted(map(int, values)))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
