"""What ranks may take, as callers say it: "80GiB", a number, or one of them for each rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from patchers.errors import OwnershipError
from patchers.names import fold_indices
from patchers.tables import amount
from sharded_ckpt.ownership.costs import ModelCosts
from sharded_ckpt.ownership.partition import Run, min_max_runs

Budget: TypeAlias = "float | str"
Budgets: TypeAlias = "Budget | Sequence[Budget]"

_UNITS = {
    f"{prefix}{binary}B": base**power
    for binary, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate(["", "K", "M", "G", "T", "P"])
    if prefix or not binary
}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)\s*")


def read_budgets(budgets: Budgets, world_size: int) -> tuple[float, ...]:
    """Return the budget of each rank as a number.

    Args:
        budgets: One for all ranks, or one for each: a number in the unit of what is counted, or a text such
            as "80GiB" or "80 GB" for bytes.
        world_size: Number of ranks.

    Raises:
        OwnershipError: There is not one for each rank, or one is no positive amount.

    Example:
        >>> read_budgets(["80GiB", "24 GB", 1e9], 3)
        (85899345920, 24000000000, 1000000000.0)
    """
    if isinstance(budgets, str) or not isinstance(budgets, Sequence):
        return (_amount_of(budgets),) * world_size
    if len(budgets) != world_size:
        raise OwnershipError(
            f"budgets has {len(budgets)} entries for {world_size} ranks; give one, or one for each rank"
        )
    return tuple(_amount_of(budget) for budget in budgets)


def _amount_of(budget: Budget) -> float:
    if isinstance(budget, str):
        match = _SIZE.fullmatch(budget)
        units = {"": 1} | {unit.lower(): factor for unit, factor in _UNITS.items()}
        if match is None or match["unit"].lower() not in units:
            raise OwnershipError(f'budget {budget!r} is no size; write "80GiB", "80 GB" or a number')
        number = float(match["number"]) * units[match["unit"].lower()]
        budget = int(number) if number.is_integer() else number
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < float("inf"):
        raise OwnershipError(f"budget {budget!r} is not a positive, finite amount")
    return budget


def misfit(costs: ModelCosts, budgets: Sequence[float]) -> str:
    """Say why a model does not fit, and by how much.

    Args:
        costs: What its parts take.
        budgets: What each rank may take; no contiguous cut keeps all of them.

    Example:
        >>> misfit(ModelCosts((4e9, 3e9, 4e9)), [5e9, 5e9])
        'it takes 11.00 GB and 2 ranks may take 10.00 GB; ...it fits on 3 ranks with 5.00 GB each'
    """
    shared, loads, by = costs.everywhere, costs.loads, costs.by
    smallest = min(budgets)
    if shared >= smallest:
        return (
            f"what every rank has takes {amount(shared, by)}, and a rank may take {amount(smallest, by)}; "
            f"allow more than {amount(shared, by)}"
        )
    runs = min_max_runs(loads, [Run(share=budget - shared) for budget in budgets])
    taken = [sum(loads[block] for block in run) + shared for run in runs]
    worst = max(range(len(budgets)), key=lambda rank: taken[rank] / budgets[rank])
    owned = f"block{'s' if len(runs[worst]) > 1 else ''} {fold_indices(runs[worst])}"
    return (
        f"it takes {amount(sum(taken), by)} and {_ranks(len(budgets))} may take "
        f"{amount(sum(budgets), by)}; in the split that comes closest, rank {worst} ({owned}) takes "
        f"{amount(taken[worst], by)} of its {amount(budgets[worst], by)}, "
        f"{amount(taken[worst] - budgets[worst], by)} too much; {_remedy(costs, max(budgets))}"
    )


def _remedy(costs: ModelCosts, budget: float) -> str:
    loads, room, by = costs.loads, budget - costs.everywhere, costs.by
    largest = max(range(len(loads)), key=loads.__getitem__)
    if loads[largest] > room:
        return (
            f"no number of ranks helps: block {largest}, with what lives beside it, takes "
            f"{amount(loads[largest] + costs.everywhere, by)} by itself"
        )
    ranks, taken = 1, 0.0
    for load in loads:
        ranks, taken = (ranks, taken + load) if taken + load <= room else (ranks + 1, load)
    return f"it fits on {_ranks(ranks)} with {amount(budget, by)} each"


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"
