"""The verb that shares blocks out among ranks."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from patchers.errors import OwnershipError
from sharded_ckpt.ownership.budgets import Budgets, misfit, read_budgets
from sharded_ckpt.ownership.costs import ModelCosts
from sharded_ckpt.ownership.counting import Countable, costs_of, index_costs
from sharded_ckpt.ownership.partition import Run, even_partition, min_max_runs
from sharded_ckpt.ownership.plan import OwnershipPlan


def plan_ownership(
    costs: Sequence[float] | ModelCosts | Countable,
    world_size: int,
    *,
    first: float = 0,
    last: float = 0,
    by: str = "bytes",
    batch: int = 1,
    length: int = 4096,
    budgets: Budgets | None = None,
    memory: ModelCosts | None = None,
    split: Literal["min-max", "even"] = "min-max",
) -> OwnershipPlan:
    """Give each rank a contiguous run of blocks, so that the dearest rank is as cheap as can be.

    The optimum is exact. Among equal optima the most even is taken, then the one whose earlier ranks own
    more blocks. With more ranks than blocks, the ranks at the end own nothing.

    Where budgets differ and are about the costs themselves, each rank's cost is compared with its budget: all
    ranks are filled to the same percentage, as nearly as can be.

    Args:
        costs: The cost of each block, in any unit; or `ModelCosts`, as `model_costs`, `skeleton_costs` and
            `measure_block_times` return them; or what they are to be counted of: a config (of transformers,
            or the content of a config.json), or a checkpoint (a directory or a hub id), whose config is read.
        world_size: Number of ranks.
        first: The cost of what lives beside the first block: the embedding. Only with a sequence of costs.
        last: The cost of what lives beside the last block: final norm and head. A tied head reads the
            embedding, so it costs as much. Only with a sequence of costs.
        by: What is counted: "bytes" or "parameters" of the weights, "count" of blocks, "flops" of a forward
            pass, "bytes+kv" of the weights and a full KV cache. Of a sequence of costs it is only shown.
        batch: Sequences of the forward pass or the cache.
        length: Tokens of a sequence.
        budgets: The most that a rank may take: one for all ranks, or one for each; a number, or a text such
            as "80GiB". They are about `memory` where that is given, else about the costs; but where a config
            or a checkpoint is counted by something else than bytes, they are about bytes and KV cache.
        memory: What the blocks take of the budgets, where that is something else than the costs.
        split: "even" deals the same number of blocks to each rank: what to compare the plan with. It is shown
            also where it breaks the budgets.

    Raises:
        OwnershipError: There is no block or no rank, a cost is negative or not finite, or the model does not
            fit into the budgets; it says by how much.
        ConfigError: The costs cannot be counted.

    Example:
        >>> print(plan_ownership([4e9, 1e9, 1e9, 1e9], 2, first=1e9, budgets=["6 GB", "4 GB"]))
        4 blocks over 2 ranks by bytes: the largest rank has 1.25x the mean
        rank  blocks  number  bytes    of mean  of budget  free     and
        0     0       1       5.00 GB  1.25x    83%        1.00 GB  embedding
        1     1-3     3       3.00 GB  0.75x    75%        1.00 GB
    """
    world_size = _positive(world_size, "world_size")
    ends = {"first": first, "last": last}
    if isinstance(costs, Sequence) and not isinstance(costs, str):
        counted = ModelCosts(tuple(costs), first, last, by)
    elif any(ends.values()):
        raise OwnershipError("first and last go with a sequence of costs; here, they are counted")
    elif isinstance(costs, ModelCosts):
        counted = costs
    else:
        counted = costs_of(costs, by=by, batch=batch, length=length)
        if budgets is not None and memory is None and not by.startswith("bytes"):
            memory = costs_of(costs, by="bytes+kv", batch=batch, length=length)
    _check(counted, memory)
    limits = None if budgets is None else read_budgets(budgets, world_size)
    runs = _even(counted, world_size) if split == "even" else _best(counted, world_size, memory, limits)
    blocks = tuple(tuple(run) for run in runs)
    return OwnershipPlan(
        blocks,
        counted.blocks,
        counted.embedding,
        counted.head,
        counted.by,
        limits,
        memory,
        counted.everywhere,
    )


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
    return plan_ownership(index_costs(nbytes, num_blocks, tied=tied), world_size)


def _best(
    costs: ModelCosts, world_size: int, memory: ModelCosts | None, limits: tuple[float, ...] | None
) -> list[range]:
    if limits is None:
        return min_max_runs(costs.loads, [Run()] * world_size)
    taken = memory or costs
    room = [limit - taken.everywhere for limit in limits]
    if min(room) <= 0:
        raise OwnershipError(f"the model does not fit: {misfit(taken, limits)}")
    runs = [Run(1 if memory else limit, limit) for limit in room]
    try:
        return min_max_runs(costs.loads, runs, taken.loads)
    except OwnershipError:
        raise OwnershipError(f"the model does not fit: {misfit(taken, limits)}") from None


def _even(costs: ModelCosts, world_size: int) -> list[range]:
    return even_partition(len(costs.blocks), world_size)


def _check(costs: ModelCosts, memory: ModelCosts | None) -> None:
    if not costs.blocks:
        raise OwnershipError("there are no blocks to own: costs is empty")
    for what, counted in (("costs", costs), ("memory", memory)):
        if counted is None:
            continue
        named = {f"{what}[{index}]": cost for index, cost in enumerate(counted.blocks)}
        ends = {"first": counted.embedding, "last": counted.head, "everywhere": counted.everywhere}
        for name, cost in {**ends, **named}.items():
            if not 0 <= cost < float("inf"):
                raise OwnershipError(f"{name} is {cost}; a cost is a finite number that is not negative")
    if memory is not None and len(memory.blocks) != len(costs.blocks):
        raise OwnershipError(f"memory is of {len(memory.blocks)} blocks, costs of {len(costs.blocks)}")


def _positive(value: Any, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise OwnershipError(f"{name} is {value!r}; it must be a positive int")
    return operator.index(value)
