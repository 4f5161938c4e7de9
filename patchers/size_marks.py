"""Where a size shows in a built layer: the sides of tensors that move with it, found by building twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

Sides = Mapping[str, tuple[int, ...]]
"""The shapes of a layer's tensors by name; a plain number that a module keeps has one side, its value."""


@dataclass(frozen=True)
class Mark:
    """One side of one tensor that moves with a size: it is `slope * size + offset` long.

    Fused projections have an offset: the rows of a `query_key_value` are those of the queries and, on top,
    `2 * head_dim` for each KV head.
    """

    tensor: str
    side: int
    slope: int
    offset: int = 0

    def size(self, sides: Sides) -> float | None:
        """Return the size that this side amounts to in a layer, or None if the layer has no such side."""
        shape = sides.get(self.tensor, ())
        return (shape[self.side] - self.offset) / self.slope if len(shape) > self.side else None


def sides_of(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters and buffers of a layer."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def numbers_of(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the whole numbers that the modules of a layer keep, such as `mlp.gate.top_k`."""
    return {
        f"{name}.{attribute}": (value,)
        for name, module in layer.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool)
    }


def fractions_of(layer: nn.Module) -> dict[str, float]:
    """Return the fractions that the modules of a layer keep, such as `self_attn.scaling`."""
    return {
        f"{name}.{attribute}": value
        for name, module in layer.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, float)
    }


def find_marks(first: Sides, second: Sides, sizes: tuple[int, int]) -> tuple[Mark, ...] | None:
    """Compare a layer that was built with one size with the same layer built with another.

    Args:
        first: Of the layer that was built with `sizes[0]`.
        second: Of the layer that was built with `sizes[1]`.
        sizes: Two different values.

    Returns:
        Every side that moved; None if the sides did not move in step with the size.
    """
    if first.keys() != second.keys():
        return None
    marks = []
    for name, shape in first.items():
        if len(shape) != len(second[name]):
            return None
        for side, (one, two) in enumerate(zip(shape, second[name], strict=True)):
            if one == two:
                continue
            slope, rest = divmod(two - one, sizes[1] - sizes[0])
            offset = one - slope * sizes[0]
            if rest or slope < 1 or offset < 0:
                return None
            marks.append(Mark(name, side, slope, offset))
    return tuple(marks)


def sizes_in(sides: Sides, marks: Iterable[Mark]) -> set[float | None]:
    """Return the sizes that a layer's marks say: one, unless they contradict each other."""
    return {mark.size(sides) for mark in marks}
