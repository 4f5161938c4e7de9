"""Into which micro-batches to cut a batch, so that the stages are busy at once. Pure data.

A step's time is not monotone in its rows (16 may be faster than 12), and stages differ; so the cut is chosen
by measured times, and uneven ones are among the candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

StepTimes = Mapping[int, float]
"""Seconds that one stage takes for a step, by rows."""

_NOISE = 0.1


def sizes_to_measure(batch: int, stages: int) -> list[int]:
    """Return the rows of a step that are worth measuring: of even cuts, and powers of two between them.

    Args:
        batch: Rows altogether.
        stages: How many stages there are; more than twice as many micro-batches would only be smaller.

    Example:
        >>> sizes_to_measure(24, stages=2)
        [6, 8, 12, 16, 24]
    """
    most = min(batch, 2 * stages)
    even = {size for count in range(1, most + 1) for size in (batch // count, -(-batch // count))}
    powers = {1 << bits for bits in range(batch.bit_length()) if min(even) <= 1 << bits <= batch}
    return sorted(even | powers)


def step_seconds(rows: Sequence[int], times: Sequence[StepTimes]) -> float:
    """Return how long all micro-batches take for one step, at best.

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


def best_rows(batch: int, times: Sequence[StepTimes]) -> list[int]:
    """Return the rows of the micro-batches whose step is the fastest; the fewest of those as good as that.

    Args:
        batch: Rows altogether.
        times: Of each stage, by rows; the sizes that all of them were measured for are candidates. A tenth of
            a step is within what measuring it twice may differ by.

    Example:
        >>> uneven = {6: 8.0, 8: 3.5, 12: 4.6, 16: 3.3, 24: 9.0}
        >>> best_rows(24, [uneven, uneven])
        [16, 8]
    """
    sizes = sorted(set.intersection(*(set(stage) for stage in times)), reverse=True)
    cuts = [(step_seconds(rows, times), rows) for rows in _cuts(batch, sizes, 2 * len(times))]
    enough = (1 + _NOISE) * min(seconds for seconds, _ in cuts)
    good = [(len(rows), seconds, rows) for seconds, rows in cuts if seconds <= enough]
    return min(good)[2]


def _cuts(batch: int, sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield every way to make a batch of at most so many sizes, the larger ones first."""
    for index, size in enumerate(sizes):
        if size == batch:
            yield [size]
        elif size < batch and most > 1:
            yield from ([size, *rest] for rest in _cuts(batch - size, sizes[index:], most - 1))
