"""Into which micro-batches to cut a batch, so that the stages are busy at once. Pure data.

A step's time is not monotone in its rows (16 may be faster than 12), and stages differ; so the cut is chosen
by measured times, and uneven ones are among the candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations_with_replacement

StepTimes = Mapping[int, float]
"""Seconds that one stage takes, by rows."""

_NOISE = 0.1


def sizes_to_measure(batch: int, most: int) -> list[int]:
    """Return the rows that are worth measuring: those of even cuts, and powers of two between them.

    Args:
        batch: Rows altogether.
        most: Micro-batches of a cut.

    Example:
        >>> sizes_to_measure(24, most=4)
        [6, 8, 12, 16, 24]
    """
    even = {size for count in range(1, min(batch, most) + 1) for size in (batch // count, -(-batch // count))}
    powers = {1 << bits for bits in range(batch.bit_length()) if min(even) <= 1 << bits <= batch}
    return sorted(even | powers)


def step_seconds(rows: Sequence[int], times: Sequence[StepTimes]) -> float:
    """Return how long all micro-batches take for one of many steps, at best.

    No less than the busiest stage works, and no less than one micro-batch takes through all stages.

    Args:
        rows: Of each micro-batch.
        times: Of each stage.

    Example:
        >>> times = [{2: 1.0, 4: 1.5}, {2: 1.0, 4: 1.5}]
        >>> step_seconds([4], times), step_seconds([2, 2], times)
        (3.0, 2.0)
    """
    busiest = max(sum(stage[size] for size in rows) for stage in times)
    longest = max(sum(stage[size] for stage in times) for size in rows)
    return max(busiest, longest)


def pass_seconds(rows: Sequence[int], times: Sequence[StepTimes]) -> float:
    """Return how long all micro-batches take from the first stage to the last, once.

    Args:
        rows: Of each micro-batch.
        times: Of each stage.

    Example:
        >>> times = [{2: 1.0, 4: 1.5}, {2: 1.0, 4: 1.5}]
        >>> pass_seconds([4], times), pass_seconds([2, 2], times)
        (3.0, 3.0)
    """
    done = [0.0] * len(rows)
    for stage in times:
        free = 0.0
        for number, size in enumerate(rows):
            done[number] = free = max(free, done[number]) + stage[size]
    return done[-1]


def best_rows(
    batch: int,
    times: Sequence[StepTimes],
    most: int,
    seconds: Callable[[Sequence[int], Sequence[StepTimes]], float] = step_seconds,
) -> list[int]:
    """Return the rows of the micro-batches that are the fastest; the fewest of those as good as that.

    Args:
        batch: Rows altogether.
        times: Of each stage, by rows; the sizes that all of them were measured for are candidates. A tenth of
            a step is within what measuring it twice may differ by.
        most: Micro-batches, at most.
        seconds: What is to be the least.

    Example:
        >>> uneven = {6: 8.0, 8: 3.5, 12: 4.6, 16: 3.3, 24: 9.0}
        >>> best_rows(24, [uneven, uneven], most=4)
        [16, 8]
    """
    sizes = sorted(set.intersection(*(set(stage) for stage in times)), reverse=True)
    cuts = [(seconds(rows, times), rows) for rows in _cuts(batch, sizes, most)]
    enough = (1 + _NOISE) * min(taken for taken, _ in cuts)
    good = [(len(rows), taken, rows) for taken, rows in cuts if taken <= enough]
    return min(good)[2]


def _cuts(batch: int, sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield every way to make a batch of at most so many parts of two sizes, the larger ones first.

    With two sizes, a sum of times over a given number of parts is as small as it gets, but for rounding.
    """
    for large, small in combinations_with_replacement(sizes, 2):
        for count in range(batch // large + 1):
            rest, odd = divmod(batch - count * large, small)
            if not odd and 0 < count + rest <= most and (large != small or not rest):
                yield [large] * count + [small] * rest
