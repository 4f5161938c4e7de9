"""Which rank owns which blocks: the plan, and what makes an assignment a valid one."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from patchers.errors import OwnershipError
from patchers.names import fold_indices
from patchers.tables import Table, amount, as_html, as_text
from sharded_ckpt.ownership.costs import ModelCosts


@dataclass(frozen=True)
class OwnershipPlan:
    """Which rank owns which blocks, and what that costs each rank.

    Printed, it is a table; so it is in a notebook.

    Attributes:
        blocks: The blocks of each rank, in rank order; a rank may own none.
        costs: The cost of each block.
        first: The cost of what lives beside the first block: the embedding.
        last: The cost of what lives beside the last block: final norm and head.
        by: What the costs are: "bytes", "parameters", "count", "flops", "seconds", …
        budgets: What each rank may take: of `memory` where that is said, else of the costs.
        memory: What the parts of the model take of the budgets, where that is something else than the costs.
        everywhere: The cost of what every rank has, whatever it owns.

    Raises:
        OwnershipError: A block is owned by several ranks or by none, or does not exist.

    Example:
        >>> plan = OwnershipPlan(((0, 1), (2, 3, 4)), (4, 1, 1, 1, 1), last=1, by="count")
        >>> plan.totals, plan.owner_of(3), plan.is_contiguous
        ((5, 4), 1, True)
    """

    blocks: tuple[tuple[int, ...], ...]
    costs: tuple[float, ...]
    first: float = 0
    last: float = 0
    by: str = "bytes"
    budgets: tuple[float, ...] | None = None
    memory: ModelCosts | None = None
    everywhere: float = 0

    def __post_init__(self) -> None:
        check_disjoint_cover(self.blocks, len(self.costs))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.blocks)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.costs)

    @property
    def totals(self) -> tuple[float, ...]:
        """The cost of each rank, embedding and head included where they live."""
        return self._per_rank(ModelCosts(self.costs, self.first, self.last, everywhere=self.everywhere))

    @property
    def taken(self) -> tuple[float, ...]:
        """What each rank takes of its budget."""
        return self.totals if self.memory is None else self._per_rank(self.memory)

    @property
    def imbalance(self) -> float:
        """The cost of the dearest rank over the mean of all ranks; 1 is even."""
        total = sum(self.totals)
        return max(self.totals) * self.world_size / total if total else 1.0

    @property
    def is_contiguous(self) -> bool:
        """Whether every rank owns a run of blocks, in rank order: what pipelines need."""
        return [block for owned in self.blocks for block in owned] == list(range(self.num_blocks))

    def owner_of(self, block: int) -> int:
        """Return the rank that owns a block.

        Raises:
            OwnershipError: There is no such block.
        """
        (block,) = check_ownership([block], self.num_blocks, what="block")
        return next(rank for rank, owned in enumerate(self.blocks) if block in owned)

    def __str__(self) -> str:
        return as_text([self.table])

    def _repr_html_(self) -> str:
        return as_html([self.table])

    @property
    def table(self) -> Table:
        """What it looks like."""
        title = (
            f"{self.num_blocks} blocks over {self.world_size} ranks by {self.by}: "
            f"the largest rank has {self.imbalance:.2f}x the mean"
        )
        return Table(self._rows(), title)

    def _rows(self) -> list[list[str]]:
        mean = sum(self.totals) / self.world_size
        rows = [["rank", "blocks", "number", self.by, "of mean", *self._budget_header(), "and"]]
        for rank, (owned, total) in enumerate(zip(self.blocks, self.totals, strict=True)):
            ends = ["embedding"] if 0 in owned and self.first else []
            ends += ["head"] if self.num_blocks - 1 in owned and self.last else []
            share = f"{total / mean:.2f}x" if mean else "-"
            shown = [str(rank), fold_indices(owned) or "-", str(len(owned)), amount(total, self.by), share]
            rows.append([*shown, *self._budget_cells(rank), ", ".join(ends)])
        return rows

    def _budget_header(self) -> list[str]:
        memory = [] if self.memory is None else [self.memory.by]
        return memory + (["of budget", "free"] if self.budgets is not None else [])

    def _budget_cells(self, rank: int) -> list[str]:
        unit = self.by if self.memory is None else self.memory.by
        cells = [] if self.memory is None else [amount(self.taken[rank], unit)]
        if self.budgets is None:
            return cells
        budget, taken = self.budgets[rank], self.taken[rank]
        return [*cells, f"{taken / budget:.0%}", amount(budget - taken, unit)]

    def _per_rank(self, costs: ModelCosts) -> tuple[float, ...]:
        return tuple(sum(costs.loads[block] for block in owned) + costs.everywhere for owned in self.blocks)


def check_ownership(owned: Iterable[int], num_blocks: int, *, what: str = "owned_block_indexes") -> set[int]:
    """Return block indexes as a set of ints, if they are indexes of blocks.

    Args:
        owned: Any integers, numpy's too; a rank may own nothing.
        num_blocks: Number of blocks of the model.
        what: What the indexes are called in errors.

    Raises:
        OwnershipError: An index is out of range (negative ones count as that), twice there, or no integer.

    Example:
        >>> check_ownership(range(2, 4), num_blocks=8)
        {2, 3}
    """
    if isinstance(owned, (str, bytes)) or not isinstance(owned, Iterable):
        raise OwnershipError(f"{what} is {owned!r}; it must be a set of ints")
    indexes = [_index(value, what) for value in owned]
    found = set(indexes)
    valid = (
        f"this model has blocks {fold_indices(range(num_blocks))}" if num_blocks else "there are no blocks"
    )
    if wrong := sorted(index for index in found if not 0 <= index < num_blocks):
        raise OwnershipError(f"{what} has {', '.join(map(str, wrong))}; {valid}")
    if twice := {index for index in found if indexes.count(index) > 1}:
        raise OwnershipError(f"{what} has {fold_indices(twice)} more than once")
    return found


def check_disjoint_cover(blocks: Sequence[Iterable[int]], num_blocks: int) -> None:
    """Check that every block is owned by exactly one rank.

    Args:
        blocks: The blocks of each rank, in rank order.
        num_blocks: Number of blocks of the model.

    Raises:
        OwnershipError: It names the blocks that are owned twice, or by nobody, and the ranks.

    Example:
        >>> check_disjoint_cover([{0, 2}, {1}], num_blocks=3)
    """
    owners: dict[int, list[int]] = {}
    for rank, owned in enumerate(blocks):
        for block in check_ownership(owned, num_blocks, what=f"the ownership of rank {rank}"):
            owners.setdefault(block, []).append(rank)
    shared: dict[tuple[int, ...], list[int]] = {}
    for block, ranks in owners.items():
        if len(ranks) > 1:
            shared.setdefault(tuple(ranks), []).append(block)
    wrong = [f"{_blocks(of)} owned by ranks {fold_indices(ranks)}" for ranks, of in shared.items()]
    if unowned := set(range(num_blocks)) - set(owners):
        wrong.append(f"{_blocks(unowned)} owned by no rank")
    if wrong:
        raise OwnershipError(f"every block must be owned by exactly one rank, but {'; '.join(wrong)}")


def _blocks(indexes: Iterable[int]) -> str:
    indexes = list(indexes)
    return f"block {indexes[0]} is" if len(indexes) == 1 else f"blocks {fold_indices(indexes)} are"


def _index(value: Any, what: str) -> int:
    try:
        index = operator.index(value)
    except TypeError:
        index = None
    if index is None or isinstance(value, bool):
        raise OwnershipError(f"{what} has {value!r}; block indexes are ints")
    return index
