"""Which rank owns which blocks, and what the blocks cost."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from sharded_ckpt.ownership.costs import MEASURES as MEASURES
    from sharded_ckpt.ownership.costs import ModelCosts as ModelCosts
    from sharded_ckpt.ownership.costs import model_costs as model_costs
    from sharded_ckpt.ownership.model_bytes import ModelBytes as ModelBytes
    from sharded_ckpt.ownership.model_bytes import model_bytes as model_bytes
    from sharded_ckpt.ownership.partition import min_max_partition as min_max_partition
    from sharded_ckpt.ownership.plan import OwnershipPlan as OwnershipPlan
    from sharded_ckpt.ownership.plan import check_disjoint_cover as check_disjoint_cover
    from sharded_ckpt.ownership.plan import check_ownership as check_ownership
    from sharded_ckpt.ownership.plan import plan_from_index as plan_from_index
    from sharded_ckpt.ownership.plan import plan_ownership as plan_ownership

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "costs": (
            "MEASURES",
            "ModelCosts",
            "model_costs",
        ),
        "model_bytes": (
            "ModelBytes",
            "model_bytes",
        ),
        "partition": ("min_max_partition",),
        "plan": (
            "OwnershipPlan",
            "check_disjoint_cover",
            "check_ownership",
            "plan_from_index",
            "plan_ownership",
        ),
    },
)
