"""What each tensor of a child is made of: pure data, decided before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from sharded_ckpt.checkpoint.entry import TensorEntry, nbytes_of


class Source(NamedTuple):
    """A tensor of the parent.

    Example:
        >>> Source("model.norm.weight", TensorEntry("BF16", (8,), 96, 112)).shape
        (8,)
    """

    key: str
    entry: TensorEntry

    @property
    def dtype(self) -> str:
        """The name that safetensors gives the dtype."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.entry.shape


@dataclass(frozen=True)
class Units:
    """Runs of `size` rows (or columns) each, by their index, in the order that they have in the child.

    Args:
        indexes: Which runs of the parent.
        size: Rows (or columns) of one run: 1 for the channels of an FFN, `head_dim` for the heads of an
            attention.
        zeroed: Which of the runs are zeros instead, by their place in the child.
    """

    indexes: Sequence[int]
    size: int = 1
    zeroed: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Rows (or columns) of the child."""
        return len(self.indexes) * self.size


@dataclass(frozen=True)
class LargestNorm:
    """The channels of an FFN with the largest weights, in ascending order; of equal ones the first.

    The score of a channel is the sum of the squares of its row in each weight `(width, hidden)` and of its
    column in each weight `(hidden, width)`. The squares of what a checkpoint holds are exact in fp64, in
    which they are summed, so that the choice does not depend on threads or on the order of summation.

    Args:
        rows_of: Keys of the weights that have a row for each channel.
        columns_of: Keys of the weights that have a column for each channel.
        keep: How many channels are kept.
    """

    rows_of: tuple[str, ...]
    columns_of: tuple[str, ...]
    keep: int

    @property
    def length(self) -> int:
        """Rows (or columns) of the child."""
        return self.keep


Selection: TypeAlias = "Units | LargestNorm"


@dataclass(frozen=True)
class Recipe:
    """One tensor of the child.

    Args:
        key: Its name in the child.
        dtype: Its dtype, as safetensors calls it.
        shape: Its shape.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor takes in the file."""
        return nbytes_of(self.dtype, self.shape)

    @property
    def sources(self) -> tuple[str, ...]:
        """The keys of the parent that are read for it."""
        return ()

    @property
    def computed(self) -> tuple[str, ...]:
        """The keys of the parent whose values are computed with, not only moved."""
        return ()


@dataclass(frozen=True)
class Copy(Recipe):
    """The tensor `source` as it is."""

    source: str

    @property
    def sources(self) -> tuple[str, ...]:
        """The keys of the parent that are read for it."""
        return (self.source,)


@dataclass(frozen=True)
class TakeRows(Recipe):
    """Some rows of `source`, which is a matrix or a vector (of a bias, elements are rows)."""

    source: str
    rows: Selection

    @property
    def sources(self) -> tuple[str, ...]:
        """The keys of the parent that are read for it."""
        return tuple(dict.fromkeys((self.source, *self.computed)))

    @property
    def computed(self) -> tuple[str, ...]:
        """The keys of the parent whose values are computed with, not only moved."""
        return _looked_at(self.rows)


@dataclass(frozen=True)
class TakeColumns(Recipe):
    """Some columns of the matrix `source`."""

    source: str
    columns: Selection

    @property
    def sources(self) -> tuple[str, ...]:
        """The keys of the parent that are read for it."""
        return tuple(dict.fromkeys((self.source, *self.computed)))

    @property
    def computed(self) -> tuple[str, ...]:
        """The keys of the parent whose values are computed with, not only moved."""
        return _looked_at(self.columns)


@dataclass(frozen=True)
class MeanOfHeads(Recipe):
    """Each head is the mean of `group` neighbouring heads of `source`, in fp32, rounded once.

    Args:
        source: A matrix or a vector of heads of `head_dim` rows each.
        group: How many heads of the parent make one of the child.
        head_dim: Rows of one head.
    """

    source: str
    group: int
    head_dim: int

    @property
    def sources(self) -> tuple[str, ...]:
        """The keys of the parent that are read for it."""
        return (self.source,)

    @property
    def computed(self) -> tuple[str, ...]:
        """The keys of the parent whose values are computed with, not only moved."""
        return self.sources


@dataclass(frozen=True)
class Product(Recipe):
    """The matrix product `left @ right` in fp32, rounded once.

    Args:
        left: A matrix `(out, inner)`.
        right: A matrix `(inner / repeat, in)`: each of its heads of `head_dim` rows stands `repeat` times, as
            the heads of values do for the query heads that share them.
        repeat: How often.
        head_dim: Rows of one head; 1 where nothing is repeated.
    """

    left: str
    right: str
    repeat: int = 1
    head_dim: int = 1

    @property
    def sources(self) -> tuple[str, ...]:
        """The keys of the parent that are read for it."""
        return (self.left, self.right)

    @property
    def computed(self) -> tuple[str, ...]:
        """The keys of the parent whose values are computed with, not only moved."""
        return self.sources


def copy_of(source: Source) -> Copy:
    """Return the recipe of a tensor that stays as it is, under its own name.

    Example:
        >>> copy_of(Source("norm.weight", TensorEntry("F32", (2,), 8, 16)))
        Copy(key='norm.weight', dtype='F32', shape=(2,), source='norm.weight')
    """
    return Copy(source.key, source.dtype, source.shape, source.key)


def take_rows(source: Source, rows: Selection) -> TakeRows:
    """Return the recipe of some rows of a tensor, under its own name.

    Example:
        >>> take_rows(Source("b", TensorEntry("F32", (6,), 8, 32)), Units((2, 0), size=2)).shape
        (4,)
    """
    return TakeRows(source.key, source.dtype, (rows.length, *source.shape[1:]), source.key, rows)


def take_columns(source: Source, columns: Selection) -> TakeColumns:
    """Return the recipe of some columns of a matrix, under its own name."""
    return TakeColumns(source.key, source.dtype, (source.shape[0], columns.length), source.key, columns)


def mean_of_heads(source: Source, group: int, head_dim: int) -> MeanOfHeads:
    """Return the recipe of the means of neighbouring heads, under the name of the tensor."""
    shape = (source.shape[0] // group, *source.shape[1:])
    return MeanOfHeads(source.key, source.dtype, shape, source.key, group, head_dim)


def product(key: str, left: Source, right: Source, repeat: int = 1, head_dim: int = 1) -> Product:
    """Return the recipe of a product of two matrices, in the dtype of the left one."""
    return Product(key, left.dtype, (left.shape[0], right.shape[1]), left.key, right.key, repeat, head_dim)


def _looked_at(selection: Selection) -> tuple[str, ...]:
    return (*selection.rows_of, *selection.columns_of) if isinstance(selection, LargestNorm) else ()
