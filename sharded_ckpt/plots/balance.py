"""What each rank has: an even split by number beside the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchers.errors import OwnershipError
from patchers.tables import amount
from sharded_ckpt.plots.drawing import ATTENTION, FFN, INK, PALE, TEXT, axes_or_new, axis_text, bare, halo

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.container import Container

    from sharded_ckpt.ownership import OwnershipPlan

_SIDE = 0.2  # half of a bar
_RANKS_UP_TO = 40  # numbers at the axis
_LABELS_UP_TO = 12  # ranks; more have no room for numbers on their bars


def plot_balance(plan: OwnershipPlan, even: OwnershipPlan, *, ax: Axes | None = None) -> Axes:
    """Draw what each rank has by a plan, beside an even split by number of blocks.

    Args:
        plan: The plan; its budgets are drawn as lines.
        even: What to compare it with: `plan_ownership(…, split="even")`.
        ax: Where to draw; by default new axes of pyplot.

    Returns:
        The axes.

    Raises:
        OwnershipError: They are of different numbers of ranks, or count different things.
        ConfigError: matplotlib is not installed.

    Example:
        >>> from sharded_ckpt import plan_ownership
        >>> plan, even = (plan_ownership(checkpoint, 2, split=split) for split in ("min-max", "even"))
        >>> ax = plot_balance(plan, even)
        >>> ax.get_ylabel()
        'bytes'
    """
    if (plan.world_size, plan.by) != (even.world_size, even.by):
        raise OwnershipError(
            f"the plan is of {plan.world_size} ranks by {plan.by}, the even split of {even.world_size} ranks "
            f"by {even.by}: they cannot be compared"
        )
    ax = axes_or_new(ax, 3.0 + 0.5 * min(plan.world_size, 20), 2.8)
    handles = [
        _bars(ax, even, PALE, -_SIDE, "even by number"),
        _bars(ax, plan, ATTENTION, _SIDE, "min-max"),
        *_lines(ax, plan),
    ]
    step = -(-plan.world_size // _RANKS_UP_TO)
    ax.set_xticks(range(0, plan.world_size, step))
    ax.set_xlabel("rank", fontsize=TEXT, color=INK)
    ax.set_ylabel(plan.by, fontsize=TEXT, color=INK)
    ax.yaxis.set_major_formatter(lambda value, _: axis_text(value, plan.by))
    ax.margins(x=0.02, y=0.1)
    bare(ax, "left", "bottom")
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=TEXT - 1
    )
    return ax


def _bars(ax: Axes, split: OwnershipPlan, color: str, shift: float, name: str) -> Container:
    """Draw one bar a rank, beside the middle; return what the legend shows."""
    label = f"{name}: at most {amount(max(split.totals), split.by)}, {split.imbalance:.2f}x the mean"
    places = [rank + shift for rank in range(split.world_size)]
    bars = ax.bar(places, split.totals, width=2 * _SIDE - 0.02, color=color, label=label, linewidth=0)
    if split.world_size <= _LABELS_UP_TO:
        texts = [amount(total, split.by).partition(" ")[0] for total in split.totals]
        ax.bar_label(bars, texts, fontsize=TEXT - 2.5, color=INK, padding=1, path_effects=halo())
    return bars


def _lines(ax: Axes, plan: OwnershipPlan) -> list[Artist | Container]:
    """Draw the mean, and what each rank may take; return what the legend shows."""
    mean = sum(plan.totals) / plan.world_size
    lines: list[Artist | Container] = [
        ax.axhline(mean, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="mean", zorder=0.5)
    ]
    if plan.budgets is not None and plan.memory is None:
        begins, ends = ([rank + side for rank in range(plan.world_size)] for side in (-0.45, 0.45))
        lines.append(ax.hlines(plan.budgets, begins, ends, color=FFN, linewidth=1.6, label="budget"))
    return lines
