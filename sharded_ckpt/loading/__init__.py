"""From files to shards: plan, fill, report."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from sharded_ckpt.loading.report import LoadReport as LoadReport
    from sharded_ckpt.loading.verbs import is_in_safetensors_format as is_in_safetensors_format
    from sharded_ckpt.loading.verbs import load_and_shard_model as load_and_shard_model
    from sharded_ckpt.loading.verbs import load_sharded_state_dict as load_sharded_state_dict

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "report": ("LoadReport",),
        "verbs": (
            "is_in_safetensors_format",
            "load_and_shard_model",
            "load_sharded_state_dict",
        ),
    },
)
