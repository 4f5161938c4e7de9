"""A plan on one page: the blocks and who owns them, and what each rank has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchers.block_config import BlockConfig
from sharded_ckpt.plots.balance import plot_balance
from sharded_ckpt.plots.drawing import new_figure, strip_width, title
from sharded_ckpt.plots.ownership import plot_ownership

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sharded_ckpt.ownership import OwnershipPlan


def plot_plan(
    blocks: Sequence[BlockConfig | None], plan: OwnershipPlan, even: OwnershipPlan, *, name: str = ""
) -> Figure:
    """Draw a plan: who owns which blocks, and below it what each rank has beside an even split.

    Args:
        blocks: What each block is; see `plot_blocks`.
        plan: The plan.
        even: What to compare it with: `plan_ownership(…, split="even")`.
        name: Of the model, for the title.

    Returns:
        A figure, which a notebook shows: `figure.savefig("plan.png")`.

    Raises:
        OwnershipError: The plan is of another number of blocks, or the two cannot be compared.
        ConfigError: matplotlib is not installed.
    """
    figure = new_figure(strip_width(len(blocks)), 5.6)
    above, below = figure.subplots(2, 1, height_ratios=[3, 2.4])
    plot_ownership(blocks, plan, ax=above)
    plot_balance(plan, even, ax=below)
    title(above, name or f"{plan.num_blocks} blocks over {plan.world_size} ranks by {plan.by}")
    return figure
