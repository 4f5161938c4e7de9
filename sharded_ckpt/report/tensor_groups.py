"""The tensors of a checkpoint in few groups: those of one dtype and shape whose names differ only in indexes.

A mixture of experts has 100,000 tensors in a dozen such groups, so whatever is asked of a checkpoint is
computed by groups.
"""

from __future__ import annotations

import re
from collections import defaultdict
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
    for file, items in files:
        for (mask, dtype, shape), keys in _by_form(items).items():
            for words, numbers in _taken_apart(mask, keys).items():
                groups.setdefault((words, dtype, shape), {}).setdefault(file, []).extend(numbers)
    found = [TensorGroup(*kind, nbytes_of(*kind[1:]), numbers) for kind, numbers in groups.items()]
    return sorted((part for group in found for part in _by_stack(group)), key=lambda part: part.name)


_Key: TypeAlias = "tuple[tuple[str, ...], str, tuple[int, ...]]"


def _by_form(items: Iterable[tuple[str, TensorEntry]]) -> dict[tuple[str, str, tuple[int, ...]], list[str]]:
    """Group names by their masks, dtypes and shapes."""
    found: defaultdict[tuple[str, str, tuple[int, ...]], list[str]] = defaultdict(list)
    listed = list(items)
    keys = [key for key, _ in listed]
    for mask, (key, (dtype, shape, _, _)) in zip(_masks(keys), listed, strict=True):
        found[mask, dtype, shape].append(key)
    return found


def _masks(keys: Sequence[str]) -> Sequence[str]:
    """Return names with all their digits made zeros: few are different, so few need be taken apart."""
    masks = "\n".join(keys).translate(_DIGITS).split("\n")
    return masks if len(masks) == len(keys) else keys


def _taken_apart(mask: str, keys: Sequence[str]) -> Mapping[tuple[str, ...], Iterable[Numbers]]:
    """Return the indexes of names that have one mask, by what stands around them."""
    spans = [match.span(1) for match in _INDEX.finditer(mask)]
    bounds = [0, *(bound for begin, end in spans for bound in (begin - 1, end)), len(mask)]
    words_of, numbers_of = _pieces(list(zip(bounds[::2], bounds[1::2], strict=True))), _pieces(spans)
    words = words_of(mask)
    if not any("0" in word for word in words):
        return {words: map(numbers_of, keys)}
    found: defaultdict[tuple[str, ...], list[Numbers]] = defaultdict(list)
    for words, numbers in zip(map(words_of, keys), map(numbers_of, keys), strict=True):
        found[words].append(numbers)
    return found


def _pieces(spans: Sequence[tuple[int, int]]) -> Callable[[str], tuple[str, ...]]:
    """Return what gives the parts of a text in these spans; several are had without a frame of Python."""
    places = [slice(*span) for span in spans]
    return itemgetter(*places) if len(places) > 1 else lambda text: tuple(text[place] for place in places)


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
