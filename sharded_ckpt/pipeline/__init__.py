"""Running a model over ranks, one run of blocks on each."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from sharded_ckpt.pipeline.stage import PipelineStage as PipelineStage

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"stage": ("PipelineStage",)})
