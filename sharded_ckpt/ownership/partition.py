"""Cutting a row of costs into contiguous runs, the dearest of which is as cheap as can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise


def min_max_partition(costs: Sequence[float], runs: int) -> list[range]:
    """Cut a row of costs into contiguous, non-empty runs: the exact optimum.

    The dearest run is as cheap as can be; among all such cuts the loads are as even as can be (the sum of
    their squares is least); among those, earlier runs are longer. Sums are exact, whatever the floats.

    The bottleneck is found by exact bisection (Pinar and Aykanat, Fast optimal load balancing algorithms for
    1D partitioning, 2004), the rest by dynamic programming over the runs that stay below it.

    Args:
        costs: Not negative; at least one.
        runs: At least one; more runs than costs give as many runs as costs.

    Example:
        >>> min_max_partition([4, 1, 1, 1, 1], 2)
        [range(0, 1), range(1, 5)]
        >>> min_max_partition([1] * 10, 4)
        [range(0, 3), range(3, 6), range(6, 8), range(8, 10)]
    """
    sums = [0, *accumulate(_integers(costs))]
    runs = min(runs, len(costs))
    return _most_even(sums, runs, _bottleneck(sums, runs))


def _integers(costs: Sequence[float]) -> list[int]:
    """Scale costs to integers, exactly: every float is a fraction."""
    exact = [Fraction(cost) for cost in costs]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    return [int(fraction * scale) for fraction in exact]


def _bottleneck(sums: Sequence[int], runs: int) -> int:
    """Return the least cost that the dearest of `runs` runs can have."""
    low = max(after - before for before, after in pairwise(sums))
    high = sums[-1]
    while low < high:
        limit = (low + high) // 2
        loads, overflow = _pack(sums, limit)
        if len(loads) <= runs:
            high = max(loads)  # jump to sums that really occur, so that few steps are needed
        else:
            low = overflow
    return high


def _pack(sums: Sequence[int], limit: int) -> tuple[list[int], int]:
    """Fill runs up to a limit; return their loads and the least limit that would fill any of them more."""
    loads, overflow, start = [], sums[-1], 0
    for end in range(1, len(sums)):
        if sums[end] - sums[start] > limit:
            overflow = min(overflow, sums[end] - sums[start])
            loads.append(sums[end - 1] - sums[start])
            start = end - 1
    return [*loads, sums[-1] - sums[start]], overflow


def _most_even(sums: Sequence[int], runs: int, limit: int) -> list[range]:
    """Cut into exactly `runs` runs of at most `limit`, with the least sum of squared loads."""
    count = len(sums) - 1
    best: dict[int, int] = {count: 0}  # by start: the least sum of squares of what follows
    choices: list[dict[int, int]] = []
    for left in range(1, runs + 1):  # runs from a start to the end of the row
        following, best, choice = best, {}, {}
        for start in range(runs - left, count - left + 1):
            for end in range(start + 1, count - left + 2):
                load = sums[end] - sums[start]
                if load > limit:
                    break
                # `<=` prefers the later end: earlier runs are longer
                if end in following and load * load + following[end] <= best.get(start, math.inf):
                    best[start], choice[start] = load * load + following[end], end
        choices.append(choice)
    cuts = [0]
    for choice in reversed(choices):
        cuts.append(choice[cuts[-1]])
    return [range(start, end) for start, end in pairwise(cuts)]
