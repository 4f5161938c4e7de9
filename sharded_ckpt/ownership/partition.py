"""Cutting a row of costs into contiguous runs, the dearest of which is as cheap as can be."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

from patchers.errors import OwnershipError


@dataclass(frozen=True)
class Run:
    """What the run of one rank may be.

    Attributes:
        share: What the cost of the run is compared with: only ratios between the runs matter.
        limit: The most that the run's `sizes` may sum up to; None for no limit.
    """

    share: float = 1
    limit: float | None = None


def min_max_partition(costs: Sequence[float], runs: int) -> list[range]:
    """Cut a row of costs into contiguous, non-empty runs: the exact optimum.

    The dearest run is as cheap as can be; among all such cuts the loads are as even as can be (the sum of
    their squares is least); among those, earlier runs are longer. Sums are exact, whatever the floats.

    Args:
        costs: Not negative; at least one.
        runs: At least one; more runs than costs give as many runs as costs.

    Example:
        >>> min_max_partition([4, 1, 1, 1, 1], 2)
        [range(0, 1), range(1, 5)]
        >>> min_max_partition([1] * 10, 4)
        [range(0, 3), range(3, 6), range(6, 8), range(8, 10)]
    """
    return min_max_runs(costs, [Run()] * min(runs, len(costs)))


def min_max_runs(
    costs: Sequence[float], runs: Sequence[Run], sizes: Sequence[float] | None = None
) -> list[range]:
    """Cut a row of costs into contiguous runs that differ in what they may take: the exact optimum.

    The largest of the runs' costs, each divided by its run's share, is as small as can be; among all such
    cuts the sum of the squares of these quotients is least; among those, fewest runs are empty; among those,
    earlier runs are longer. Sums are exact, whatever the floats.

    The bottleneck is found by exact bisection (Pinar and Aykanat, Fast optimal load balancing algorithms for
    1D partitioning, 2004), the rest by dynamic programming over the runs that stay below it.

    Args:
        costs: Not negative; at least one.
        runs: One for each run, in order.
        sizes: What the limits are about, one for each cost; by default the costs themselves.

    Raises:
        OwnershipError: No cut keeps all limits.

    Example:
        >>> min_max_runs([1] * 6, [Run(share=2), Run(share=1)])
        [range(0, 4), range(4, 6)]
        >>> min_max_runs([1] * 6, [Run(limit=10), Run()], sizes=[5] * 6)
        [range(0, 2), range(2, 6)]
    """
    row = _Row.of(costs, runs, costs if sizes is None else sizes)
    return row.most_even(row.bottleneck())


def even_partition(count: int, runs: int) -> list[range]:
    """Cut a row into runs of the same length, as far as that goes; the longer ones come first.

    Example:
        >>> even_partition(7, 3)
        [range(0, 3), range(3, 5), range(5, 7)]
    """
    length, longer = divmod(count, runs)
    cuts = [0, *accumulate(length + (run < longer) for run in range(runs))]
    return [range(start, end) for start, end in pairwise(cuts)]


@dataclass(frozen=True)
class _Row:
    """A row of costs in whole numbers: prefix sums for each run, so that its loads compare with the others'.

    Attributes:
        sums: For each run the prefix sums of the costs, divided by its share.
        sizes: Prefix sums of the sizes.
        limits: For each run the most that its sizes may sum up to.
    """

    sums: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    limits: tuple[int, ...]

    @classmethod
    def of(cls, costs: Sequence[float], runs: Sequence[Run], sizes: Sequence[float]) -> _Row:
        inverse = _integers([1 / Fraction(run.share) for run in runs])
        whole = _integers(costs)
        scaled = {factor: (0, *accumulate(factor * cost for cost in whole)) for factor in set(inverse)}
        bounds = [sum(map(Fraction, sizes)) if run.limit is None else Fraction(run.limit) for run in runs]
        exact = _integers([*sizes, *bounds])
        return cls(
            tuple(scaled[factor] for factor in inverse),
            (0, *accumulate(exact[: len(sizes)])),
            tuple(exact[len(sizes) :]),
        )

    @property
    def count(self) -> int:
        return len(self.sizes) - 1

    def fill(self, bound: int) -> tuple[list[int], int | None]:
        """Fill each run as far as a bound on the loads and its limit go.

        Returns:
            Where the runs end, and the least bound that would fill any of them more; None if none would.
        """
        ends, higher, start = [], [], 0
        for sums, limit in zip(self.sums, self.limits, strict=True):
            by_size = bisect_right(self.sizes, self.sizes[start] + limit) - 1
            end = min(by_size, bisect_right(sums, sums[start] + bound) - 1)
            if end < by_size:
                higher.append(sums[end + 1] - sums[start])
            ends.append(end)
            start = end
        return ends, min(higher, default=None)

    def bottleneck(self) -> int:
        """Return the least load that the dearest run can have."""
        low, high = 0, max(sums[-1] for sums in self.sums)
        if self.fill(high)[0][-1] < self.count:
            raise OwnershipError("no cut of the row keeps all limits")
        while low < high:
            bound = (low + high) // 2
            ends, higher = self.fill(bound)
            if ends[-1] == self.count:
                high = self._largest(ends)  # jump to loads that really occur, so that few steps are needed
            else:
                low = high if higher is None else higher
        return high

    def _nearest(self, bound: int) -> list[int]:
        """Return where each run begins at the earliest, if the runs after it keep to a bound; and the end."""
        starts = [self.count]
        for sums, limit in zip(reversed(self.sums), reversed(self.limits), strict=True):
            end = starts[-1]
            by_size = bisect_left(self.sizes, self.sizes[end] - limit)
            starts.append(max(by_size, bisect_left(sums, sums[end] - bound)))
        return starts[::-1]

    def _largest(self, ends: Sequence[int]) -> int:
        return max(sums[end] - sums[start] for sums, (start, end) in self._cut(ends))

    def _cut(self, ends: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, int]]]:
        return list(zip(self.sums, pairwise([0, *ends]), strict=True))

    def most_even(self, bound: int) -> list[range]:
        """Cut with loads of at most `bound`, such that the sum of their squares is least."""
        nearest, furthest = self._nearest(bound), [0, *self.fill(bound)[0]]
        best: dict[int, tuple[int, int]] = {self.count: (0, 0)}  # by start: squares and empty runs to come
        choices: list[dict[int, int]] = []
        for run in reversed(range(len(self.sums))):
            sums, limit = self.sums[run], self.limits[run]
            following, best, choice = best, {}, {}
            for start in range(nearest[run], furthest[run] + 1):
                last = min(furthest[run + 1], bisect_right(self.sizes, self.sizes[start] + limit) - 1)
                for end in range(max(start, nearest[run + 1]), last + 1):
                    load = sums[end] - sums[start]
                    if load > bound:
                        break
                    if end in following:
                        squares, empty = following[end]
                        worth = squares + load * load, empty + (end == start)
                        if start not in best or worth <= best[start]:  # later ends: earlier runs are longer
                            best[start], choice[start] = worth, end
            choices.append(choice)
        cuts = [0]
        for choice in reversed(choices):
            cuts.append(choice[cuts[-1]])
        return [range(start, end) for start, end in pairwise(cuts)]


def _integers(values: Sequence[float | Fraction]) -> list[int]:
    """Scale numbers to integers, exactly: every float is a fraction."""
    exact = [Fraction(value) for value in values]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    return [int(fraction * scale) for fraction in exact]
