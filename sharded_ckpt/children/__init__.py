"""A child from its parent: the checkpoint of a heterogeneous model, streamed out of that of a larger one."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from sharded_ckpt.children.choices import Indexes as Indexes
    from sharded_ckpt.children.choices import Scores as Scores
    from sharded_ckpt.children.init import init_child_from_parent as init_child_from_parent
    from sharded_ckpt.children.plan import ChildPlan as ChildPlan
    from sharded_ckpt.children.report import ChildReport as ChildReport

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "choices": ("Indexes", "Scores"),
        "init": ("init_child_from_parent",),
        "plan": ("ChildPlan",),
        "report": ("ChildReport",),
    },
)
