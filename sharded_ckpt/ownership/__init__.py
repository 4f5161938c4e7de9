"""Which rank owns which blocks, and what the blocks cost."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from sharded_ckpt.ownership.block_times import measure_block_times as measure_block_times
    from sharded_ckpt.ownership.costs import MEASURES as MEASURES
    from sharded_ckpt.ownership.costs import ModelCosts as ModelCosts
    from sharded_ckpt.ownership.costs import model_costs as model_costs
    from sharded_ckpt.ownership.counting import costs_of as costs_of
    from sharded_ckpt.ownership.counting import index_costs as index_costs
    from sharded_ckpt.ownership.partition import min_max_partition as min_max_partition
    from sharded_ckpt.ownership.plan import OwnershipPlan as OwnershipPlan
    from sharded_ckpt.ownership.plan import check_disjoint_cover as check_disjoint_cover
    from sharded_ckpt.ownership.plan import check_ownership as check_ownership
    from sharded_ckpt.ownership.planning import plan_from_index as plan_from_index
    from sharded_ckpt.ownership.planning import plan_ownership as plan_ownership
    from sharded_ckpt.ownership.skeleton import skeleton_costs as skeleton_costs

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "block_times": ("measure_block_times",),
        "costs": (
            "MEASURES",
            "ModelCosts",
            "model_costs",
        ),
        "counting": ("costs_of", "index_costs"),
        "partition": ("min_max_partition",),
        "plan": (
            "OwnershipPlan",
            "check_disjoint_cover",
            "check_ownership",
        ),
        "planning": ("plan_from_index", "plan_ownership"),
        "skeleton": ("skeleton_costs",),
    },
)
