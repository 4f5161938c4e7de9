"""Pictures of models and plans, drawn with matplotlib (`pip install "sharded-ckpt[plots]"`)."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from sharded_ckpt.plots.balance import plot_balance as plot_balance
    from sharded_ckpt.plots.blocks import plot_blocks as plot_blocks
    from sharded_ckpt.plots.ownership import plot_ownership as plot_ownership
    from sharded_ckpt.plots.page import plot_plan as plot_plan
    from sharded_ckpt.plots.reads import plot_reads as plot_reads

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "balance": ("plot_balance",),
        "blocks": ("plot_blocks",),
        "ownership": ("plot_ownership",),
        "page": ("plot_plan",),
        "reads": ("plot_reads",),
    },
)
