"""Who owns which blocks, drawn over the strip of blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from patchers.block_config import BlockConfig
from patchers.errors import OwnershipError
from sharded_ckpt.plots.blocks import plot_blocks
from sharded_ckpt.plots.drawing import PALE, TEXT, axes_or_new, rank_colors, strip_width, text_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sharded_ckpt.ownership import OwnershipPlan

_BAND, _GAP = 0.18, 0.03
_BOTTOM = 0.52


def plot_ownership(
    blocks: Sequence[BlockConfig | None], plan: OwnershipPlan, *, ax: Axes | None = None
) -> Axes:
    """Draw a model as a strip of blocks, and over it which rank owns which.

    Args:
        blocks: What each block is; see `plot_blocks`.
        plan: Who owns what; also one that is not contiguous.
        ax: Where to draw; by default new axes of pyplot.

    Returns:
        The axes.

    Raises:
        OwnershipError: The plan is of another number of blocks.
        ConfigError: matplotlib is not installed.

    Example:
        >>> from sharded_ckpt import plan_ownership
        >>> from sharded_ckpt.report.model_blocks import model_blocks
        >>> blocks = model_blocks(checkpoint)  # the path of a checkpoint, or a config
        >>> ax = plot_ownership(blocks, plan_ownership(checkpoint, 2))
    """
    if len(blocks) != plan.num_blocks:
        raise OwnershipError(f"the plan is of {plan.num_blocks} blocks, the model has {len(blocks)}")
    ax = plot_blocks(blocks, ax=axes_or_new(ax, strip_width(len(blocks)), 3.0))
    colors = rank_colors(plan.world_size)
    for rank, owned in enumerate(plan.blocks):
        for first, last in _runs(owned):
            _band(ax, rank, first, last, colors[rank], plan.num_blocks)
    ax.set_ylim(ax.get_ylim()[0], _BOTTOM + _BAND)
    ax.set_yticks([*ax.get_yticks(), _BOTTOM + _BAND / 2], [*_tick_texts(ax), "rank"])
    return ax


def _band(ax: Axes, rank: int, first: int, last: int, color: str, num_blocks: int) -> None:
    """Draw one run of blocks of a rank, with its number where there is room."""
    width = last - first + 1
    ax.barh(
        _BOTTOM + _BAND / 2,
        width - 0.14,
        _BAND - _GAP,
        left=first - 0.43,
        color=[color],
        linewidth=0,
    )
    if width / num_blocks > 0.012 * len(str(rank)):
        ax.text(
            (first + last) / 2,
            _BOTTOM + _BAND / 2,
            str(rank),
            ha="center",
            va="center",
            fontsize=TEXT,
            color=text_on(color),
        )
    if first:
        ax.axvline(first - 0.5, color=PALE, linewidth=0.6, linestyle=(0, (3, 3)), zorder=0)


def _runs(owned: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Give the first and the last block of each run."""
    for _, run in groupby(enumerate(sorted(owned)), key=lambda pair: pair[1] - pair[0]):
        blocks = [block for _, block in run]
        yield blocks[0], blocks[-1]


def _tick_texts(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]
