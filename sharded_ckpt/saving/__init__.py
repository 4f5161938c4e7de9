"""From shards to one checkpoint, whole or not at all."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from sharded_ckpt.saving.verbs import save_sharded_checkpoint as save_sharded_checkpoint
    from sharded_ckpt.saving.verbs import save_sharded_model as save_sharded_model

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "verbs": (
            "save_sharded_checkpoint",
            "save_sharded_model",
        ),
    },
)
