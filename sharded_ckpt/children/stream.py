"""Makes the tensors of a child one after the other, each from no more of the parent than it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from patchers.errors import CheckpointError
from patchers.names import fold
from sharded_ckpt.checkpoint.entry import TensorEntry
from sharded_ckpt.checkpoint.shard import Progress
from sharded_ckpt.checkpoint.tensors import dtype_of, shape_of
from sharded_ckpt.checkpoint.writer import LazyTensor
from sharded_ckpt.children.memory import allocate
from sharded_ckpt.children.recipes import (
    Copy,
    LargestNorm,
    MeanOfHeads,
    Product,
    Recipe,
    Selection,
    TakeColumns,
    TakeRows,
    Units,
)
from sharded_ckpt.children.rows import RowReader, ascending_runs


class ChildStream:
    """Makes tensors by recipe. Not for several threads at once: a writer takes one tensor after the other.

    Args:
        parent: Where from.
        progress: Called with the bytes of each tensor that was made.
    """

    def __init__(self, parent: RowReader, progress: Progress | None = None) -> None:
        self._parent, self._progress = parent, progress
        self._chosen: tuple[LargestNorm, list[int]] | None = None

    def tensors(self, recipes: Sequence[Recipe]) -> dict[str, LazyTensor]:
        """Return tensors that are made when they are written."""
        return {recipe.key: self._lazy(recipe) for recipe in recipes}

    def make(self, recipe: Recipe) -> torch.Tensor:
        """Make one tensor."""
        made = _MAKERS[type(recipe)](self, recipe)
        if self._progress is not None:
            self._progress(recipe.nbytes)
        return made

    def _lazy(self, recipe: Recipe) -> LazyTensor:
        return LazyTensor(*_kind_of(recipe), lambda: self.make(recipe))

    def _copy(self, recipe: Copy) -> torch.Tensor:
        entry = self._parent.entry(recipe.source)
        if recipe.dtype == entry.dtype or not entry.shape:
            return self._parent.whole(recipe.source).to(_kind_of(recipe)[0])
        out = _empty(recipe)
        for first, window in self._parent.windows(recipe.source):
            out[first : first + len(window)] = window
        return out

    def _take_rows(self, recipe: TakeRows) -> torch.Tensor:
        entry, out = self._parent.entry(recipe.source), _empty(recipe)
        rows = self._places(recipe.rows)
        for start, end in ascending_runs(rows, entry.nbytes // entry.shape[0]):
            first = rows[start]
            window = self._parent.rows(recipe.source, first, rows[end - 1] + 1)
            _select(window, 0, [row - first for row in rows[start:end]], out[start:end])
        return out

    def _take_columns(self, recipe: TakeColumns) -> torch.Tensor:
        out, columns = _empty(recipe), self._places(recipe.columns)
        for first, window in self._parent.windows(recipe.source):
            _select(window, 1, columns, out[first : first + len(window)])
        if isinstance(recipe.columns, Units):
            size = recipe.columns.size
            for unit in recipe.columns.zeroed:
                out[:, unit * size : (unit + 1) * size] = 0
        return out

    def _mean_of_heads(self, recipe: MeanOfHeads) -> torch.Tensor:
        out, size = _empty(recipe), recipe.head_dim
        for head in range(recipe.shape[0] // size):
            first = head * recipe.group * size
            heads = self._parent.rows(recipe.source, first, first + recipe.group * size)
            mean = heads.unflatten(0, (recipe.group, size)).mean(0, dtype=torch.float32)
            out[head * size : (head + 1) * size] = mean
        return out

    def _product(self, recipe: Product) -> torch.Tensor:
        right = self._parent.fp32(recipe.right)
        if recipe.repeat > 1:
            heads = right.unflatten(0, (-1, 1, recipe.head_dim))
            repeated = allocate((len(heads), recipe.repeat, *heads.shape[2:]), torch.float32).copy_(heads)
            right = repeated.flatten(0, 2)
            del heads, repeated
        result = allocate(recipe.shape, torch.float32)
        with torch.autocast("cpu", enabled=False):
            torch.mm(self._parent.fp32(recipe.left), right, out=result)
        del right
        return _empty(recipe).copy_(result)

    def _places(self, selection: Selection) -> list[int]:
        """Return the rows or columns of a selection, one by one."""
        if isinstance(selection, Units):
            size = selection.size
            return [unit * size + offset for unit in selection.indexes for offset in range(size)]
        if self._chosen is None or self._chosen[0] != selection:  # gate, up and down of a block have the same
            self._chosen = selection, self._largest(selection)
        return self._chosen[1]

    def _largest(self, selection: LargestNorm) -> list[int]:
        scores = torch.zeros((), dtype=torch.float64, device="cpu")
        for keys, across in ((selection.rows_of, 1), (selection.columns_of, 0)):
            for key in keys:
                scores = scores + self._sum_of_squares(key, across)
        if not scores.isfinite().all():
            raise CheckpointError(
                f"{self._parent.location}: channels cannot be chosen by norm, since there is a NaN or an "
                f"infinity in {fold((*selection.rows_of, *selection.columns_of))}"
            )
        order = torch.argsort(scores, descending=True, stable=True)  # of equal ones the first comes first
        kept: list[int] = order[: selection.keep].sort().values.tolist()
        return kept

    def _sum_of_squares(self, key: str, across: int) -> torch.Tensor:
        """Return the sum of squares along a dimension, in fp64."""
        sums = torch.zeros(self._parent.entry(key).shape[1 - across], dtype=torch.float64, device="cpu")
        buffer: torch.Tensor | None = None
        for first, window in self._parent.windows(key):
            buffer = allocate(tuple(window.shape), torch.float64) if buffer is None else buffer
            squares = buffer[: len(window)].copy_(window).square_().sum(across)
            if across:
                sums[first : first + len(squares)] = squares
            else:
                sums += squares
        return sums


def _kind_of(recipe: Recipe) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return dtype and shape of the tensor as torch knows them."""
    entry = TensorEntry(recipe.dtype, recipe.shape, 0, recipe.nbytes)
    return dtype_of(recipe.key, entry, "the child"), shape_of(entry)


def _empty(recipe: Recipe) -> torch.Tensor:
    dtype, shape = _kind_of(recipe)
    return allocate(shape, dtype)


def _select(window: torch.Tensor, dim: int, places: Sequence[int], out: torch.Tensor) -> None:
    """Select rows or columns; they are cast if `out` has another dtype."""
    index = torch.tensor(places, dtype=torch.int64, device="cpu")
    if window.dtype == out.dtype:
        torch.index_select(window, dim, index, out=out)
    else:
        out.copy_(window.index_select(dim, index))


_MAKERS: Mapping[type[Recipe], Callable[[ChildStream, Any], torch.Tensor]] = {
    Copy: ChildStream._copy,
    TakeRows: ChildStream._take_rows,
    TakeColumns: ChildStream._take_columns,
    MeanOfHeads: ChildStream._mean_of_heads,
    Product: ChildStream._product,
}
