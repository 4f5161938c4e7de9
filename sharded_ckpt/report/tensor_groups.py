"""The tensors of a checkpoint in few groups: those of one dtype and shape whose names differ only in indexes.

A mixture of experts has 100,000 tensors in a dozen such groups, so whatever is asked of a checkpoint is
computed by groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import Any, TypeAlias

from patchers.names import fold_indices, split_block
from sharded_ckpt.checkpoint.entry import DTYPE_BITS, TensorEntry, nbytes_of

Numbers: TypeAlias = "tuple[str, ...]"
"""The indexes in a name, in their order."""

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")
_SPLIT = _INDEX.split
_DIGITS = str.maketrans("123456789", "0" * 9)


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one dtype and shape whose names differ only in their indexes.

    Attributes:
        words: What stands before, between and after the indexes.
        dtype: As safetensors calls it.
        shape: As in the files.
        size: Bytes of each.
        numbers: The indexes of each, by the file that holds it.
    """

    words: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    size: int
    numbers: Mapping[str, list[Numbers]]

    @cached_property
    def name(self) -> str:
        """The names, indexes folded; of several indexes not every combination need exist."""
        text = self.words[0]
        for at, word in enumerate(self.words[1:]):
            different = set(map(itemgetter(at), self._all))
            folded = fold_indices(map(int, different))
            text += f".{folded}{word}" if len(different) == 1 else f".{{{folded}}}{word}"
        return text

    @property
    def count(self) -> int:
        """How many tensors."""
        return sum(map(len, self.numbers.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.count * self.size

    @property
    def elements(self) -> int:
        """Elements of each."""
        return self.size * 8 // DTYPE_BITS[self.dtype]

    @cached_property
    def stack(self) -> str | None:
        """Where the blocks are that the tensors belong to, `model.layers`; None outside of blocks."""
        place = split_block(self.words[0] + _joined(self._all[0], self.words[1:]))
        return None if place is None else place[0]

    @cached_property
    def block_position(self) -> int:
        """Which of the indexes is that of the block."""
        return len(_SPLIT(self.stack or "")) // 2

    def blocks(self) -> set[int]:
        """Return the blocks that the tensors belong to."""
        at = self.block_position
        return set(map(int, set(map(itemgetter(at), self._all))))

    def tails(self) -> dict[int, list[Numbers]]:
        """Return the indexes that follow that of the block, by block."""
        found: dict[str, list[Numbers]] = {}
        at = self.block_position
        for numbers in self._all:
            found.setdefault(numbers[at], []).append(numbers[at + 1 :])
        return {int(block): tails for block, tails in found.items()}

    def name_in_block(self, tail: Numbers) -> str:
        """Return the name within its block of a tensor."""
        word, *words = self.words[self.block_position + 1 :]
        return (word + _joined(tail, words)).removeprefix(".")

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, names folded."""
        said = {"name": self.name, "dtype": self.dtype, "shape": self.shape}
        return {**said, "count": self.count, "nbytes": self.nbytes, "files": sorted(self.numbers)}

    @cached_property
    def _all(self) -> list[Numbers]:
        return [numbers for listed in self.numbers.values() for numbers in listed]


def group_tensors(files: Iterable[tuple[str, Iterable[tuple[str, TensorEntry]]]]) -> list[TensorGroup]:
    """Group the tensors of a checkpoint.

    Args:
        files: Each file with its tensors.

    Example:
        >>> entry = TensorEntry("BF16", (4, 2), 0, 16)
        >>> items = [(f"model.layers.{i}.mlp.up_proj.weight", entry) for i in (0, 1, 3)]
        >>> (group,) = group_tensors([("model.safetensors", items)])
        >>> group.name, group.count, group.stack
        ('model.layers.{0-1,3}.mlp.up_proj.weight', 3, 'model.layers')
    """
    groups: dict[_Key, dict[str, list[Numbers]]] = {}
    known: dict[str, _Form] = {}
    for file, items in files:
        here: dict[_Key, list[Numbers]] = {}
        listed = list(items)
        for mask, (key, (dtype, shape, _, _)) in zip(_masks([key for key, _ in listed]), listed, strict=True):
            if mask not in known:
                known[mask] = _form_of(mask)
            words, numbers_of = known[mask]
            kind = words or tuple(_SPLIT(key)[::2]), dtype, shape
            here.setdefault(kind, []).append(numbers_of(key))
        for kind, numbers in here.items():
            groups.setdefault(kind, {})[file] = numbers
    found = [TensorGroup(*kind, nbytes_of(*kind[1:]), numbers) for kind, numbers in groups.items()]
    return sorted((part for group in found for part in _by_stack(group)), key=lambda part: part.name)


_Key: TypeAlias = "tuple[tuple[str, ...], str, tuple[int, ...]]"
_Form: TypeAlias = "tuple[tuple[str, ...] | None, Callable[[str], Numbers]]"


def _masks(keys: Sequence[str]) -> Sequence[str]:
    """Return names with all their digits made zeros: few are different, so few need be taken apart."""
    masks = "\n".join(keys).translate(_DIGITS).split("\n")
    return masks if len(masks) == len(keys) else keys


def _form_of(mask: str) -> _Form:
    """Return the words of the names with a mask, None if digits are in them, and what gives their indexes."""
    words = tuple(_SPLIT(mask)[::2])
    places = [slice(*match.span(1)) for match in _INDEX.finditer(mask)]
    several = itemgetter(*places) if len(places) > 1 else None
    numbers_of = several or (lambda key: tuple(key[place] for place in places))
    return (None if any("0" in word for word in words) else words), numbers_of


def _by_stack(group: TensorGroup) -> list[TensorGroup]:
    """Part a group whose blocks are in several numbered places (`stages.0.blocks`, `stages.1.blocks`)."""
    at = group.block_position
    if group.stack is None or at == 0:
        return [group]
    places: dict[Numbers, dict[str, list[Numbers]]] = {}
    for file, listed in group.numbers.items():
        for numbers in listed:
            places.setdefault(numbers[:at], {}).setdefault(file, []).append(numbers)
    return [replace(group, numbers=numbers) for numbers in places.values()]


def _joined(numbers: Iterable[str], words: Iterable[str]) -> str:
    return "".join(f".{number}{word}" for number, word in zip(numbers, words, strict=True))
