"""From a state dict on rank 0 to the shards of all ranks, in bounded chunks."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from sharded_ckpt.distribute.verbs import load_state_dict_to_shards as load_state_dict_to_shards

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "verbs": ("load_state_dict_to_shards",),
    },
)
