"""Which rank owns which blocks."""

from __future__ import annotations

import html
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchers.errors import OwnershipError
from patchers.names import block_of, fold_indices
from sharded_ckpt.ownership.partition import min_max_partition


@dataclass(frozen=True)
class OwnershipPlan:
    """Which rank owns which blocks, and what that costs each rank.

    Printed, it is a table; so it is in a notebook.

    Attributes:
        blocks: The blocks of each rank, in rank order; a rank may own none.
        costs: The cost of each block.
        first: The cost of what lives beside the first block: the embedding.
        last: The cost of what lives beside the last block: final norm and head.
        by: What the costs are: "bytes", "parameters", "count", "flops", …

    Raises:
        OwnershipError: A block is owned by several ranks or by none, or does not exist.

    Example:
        >>> plan = plan_ownership([4, 1, 1, 1, 1], 2, last=1, by="count")
        >>> plan.blocks, plan.totals, plan.owner_of(3)
        (((0, 1), (2, 3, 4)), (5, 4), 1)
    """

    blocks: tuple[tuple[int, ...], ...]
    costs: tuple[float, ...]
    first: float = 0
    last: float = 0
    by: str = "bytes"

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
        return tuple(
            sum(self.costs[block] for block in owned)
            + (self.first if 0 in owned else 0)
            + (self.last if self.num_blocks - 1 in owned else 0)
            for owned in self.blocks
        )

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
        header, *rows = self._table()
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        header, *rows = self._table()
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table><caption>{html.escape(self._title())}</caption><tr>{heads}</tr>{body}</table>"

    def _title(self) -> str:
        return (
            f"{self.num_blocks} blocks over {self.world_size} ranks by {self.by}: "
            f"the largest rank has {self.imbalance:.2f}x the mean"
        )

    def _table(self) -> list[list[str]]:
        mean = sum(self.totals) / self.world_size
        rows = [["rank", "blocks", "number", self.by, "of mean", "and"]]
        for rank, (owned, total) in enumerate(zip(self.blocks, self.totals, strict=True)):
            ends = ["embedding"] if 0 in owned and self.first else []
            ends += ["head"] if self.num_blocks - 1 in owned and self.last else []
            share = f"{total / mean:.2f}x" if mean else "-"
            shown = [str(rank), fold_indices(owned) or "-", str(len(owned)), _show(total, self.by), share]
            rows.append([*shown, ", ".join(ends)])
        return rows


def plan_ownership(
    costs: Sequence[float], world_size: int, *, first: float = 0, last: float = 0, by: str = "bytes"
) -> OwnershipPlan:
    """Give each rank a contiguous run of blocks, so that the dearest rank is as cheap as can be.

    The optimum is exact. Among equal optima the most even is taken, then the one whose earlier ranks own
    more blocks. With more ranks than blocks, the ranks at the end own nothing.

    Args:
        costs: The cost of each block, in any unit.
        world_size: Number of ranks.
        first: The cost of what lives beside the first block: the embedding.
        last: The cost of what lives beside the last block: final norm and head. A tied head reads the
            embedding, so it costs as much.
        by: What the costs are; only shown.

    Raises:
        OwnershipError: There is no block or no rank, or a cost is negative or not finite.

    Example:
        >>> print(plan_ownership([4e9, 1e9, 1e9, 1e9], 2, first=1e9))
        4 blocks over 2 ranks by bytes: the largest rank has 1.25x the mean
        rank  blocks  number  bytes    of mean  and
        0     0       1       5.00 GB  1.25x    embedding
        1     1-3     3       3.00 GB  0.75x
    """
    world_size = _positive(world_size, "world_size")
    if not len(costs):
        raise OwnershipError("there are no blocks to own: costs is empty")
    for name, cost in [("first", first), ("last", last), *((f"costs[{i}]", c) for i, c in enumerate(costs))]:
        if not 0 <= cost < float("inf"):
            raise OwnershipError(f"{name} is {cost}; a cost is a finite number that is not negative")
    loads = list(costs)
    loads[0] += first
    loads[-1] += last
    runs = min_max_partition(loads, world_size)
    blocks = [tuple(run) for run in runs] + [()] * (world_size - len(runs))
    return OwnershipPlan(tuple(blocks), tuple(costs), first, last, by)


def plan_from_index(
    nbytes: Mapping[str, int], num_blocks: int, world_size: int, *, tied: bool | None = None
) -> OwnershipPlan:
    """Plan by the bytes of each tensor of a checkpoint, as its headers tell them.

    Args:
        nbytes: Bytes of each tensor, by key.
        num_blocks: Number of blocks; a block without tensors costs nothing.
        world_size: Number of ranks.
        tied: Whether the last rank reads the embedding for its head. By default, if there is no head.

    Raises:
        OwnershipError: A key belongs to a block that the model does not have.

    Example:
        >>> sizes = {f"model.layers.{i}.mlp.weight": 100 for i in range(4)}
        >>> plan_from_index({"model.embed_tokens.weight": 300, **sizes}, 4, 2).blocks
        ((0, 1), (2, 3))
    """
    costs, first, last, has_head = [0] * num_blocks, 0, 0, False
    for key, size in nbytes.items():
        block = block_of(key)
        if block is not None:
            if block >= num_blocks:
                raise OwnershipError(f"{key} is of block {block}, but the model has {num_blocks} blocks")
            costs[block] += size
        elif _is_embedding(key):
            first += size
        else:
            last += size
            has_head = has_head or not any(word in key for word in ("norm", "ln_f"))
    if tied if tied is not None else not has_head:
        last += first
    return plan_ownership(costs, world_size, first=first, last=last)


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


def _positive(value: Any, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise OwnershipError(f"{name} is {value!r}; it must be a positive int")
    return operator.index(value)


def _is_embedding(key: str) -> bool:
    """Guess from a name outside the blocks: GPT-NeoX calls its head "embed_out"."""
    return any(word in key for word in ("embed", "wte", "wpe")) and "embed_out" not in key


def _show(cost: float, by: str) -> str:
    unit = "B" if by.startswith("bytes") else ""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if cost >= factor:
            return f"{cost / factor:.2f} {prefix}{unit}"
    return f"{cost:g} {unit}".rstrip()
