"""Block-sharded loading, running, changing and saving of heterogeneous decoder models."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from patchers.errors import BlockConfigError as BlockConfigError
    from patchers.errors import CheckpointError as CheckpointError
    from patchers.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from patchers.errors import CollectiveError as CollectiveError
    from patchers.errors import ConfigError as ConfigError
    from patchers.errors import FamilyError as FamilyError
    from patchers.errors import MissingKeysError as MissingKeysError
    from patchers.errors import OwnershipError as OwnershipError
    from patchers.errors import PartialModelError as PartialModelError
    from patchers.errors import PatchError as PatchError
    from patchers.errors import ShardedCkptError as ShardedCkptError
    from sharded_ckpt.children import init_child_from_parent as init_child_from_parent
    from sharded_ckpt.config import load_model_config as load_model_config
    from sharded_ckpt.distribute.verbs import load_state_dict_to_shards as load_state_dict_to_shards
    from sharded_ckpt.launch import run_on_ranks as run_on_ranks
    from sharded_ckpt.loading.report import LoadReport as LoadReport
    from sharded_ckpt.loading.verbs import is_in_safetensors_format as is_in_safetensors_format
    from sharded_ckpt.loading.verbs import load_and_shard_model as load_and_shard_model
    from sharded_ckpt.loading.verbs import load_sharded_state_dict as load_sharded_state_dict
    from sharded_ckpt.model import create_local_shard_ as create_local_shard_
    from sharded_ckpt.model import create_sharded_model as create_sharded_model
    from sharded_ckpt.ownership.plan import OwnershipPlan as OwnershipPlan
    from sharded_ckpt.ownership.planning import plan_ownership as plan_ownership
    from sharded_ckpt.pipeline.stage import PipelineStage as PipelineStage
    from sharded_ckpt.runtime import Runtime as Runtime
    from sharded_ckpt.runtime import default_runtime as default_runtime
    from sharded_ckpt.saving.verbs import save_sharded_checkpoint as save_sharded_checkpoint
    from sharded_ckpt.saving.verbs import save_sharded_model as save_sharded_model
    from sharded_ckpt.surgery import set_submodule as set_submodule

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "children": ("init_child_from_parent",),
        "config": ("load_model_config",),
        "distribute.verbs": ("load_state_dict_to_shards",),
        "launch": ("run_on_ranks",),
        "loading.report": ("LoadReport",),
        "loading.verbs": ("is_in_safetensors_format", "load_and_shard_model", "load_sharded_state_dict"),
        "model": ("create_local_shard_", "create_sharded_model"),
        "ownership.plan": ("OwnershipPlan",),
        "ownership.planning": ("plan_ownership",),
        "pipeline.stage": ("PipelineStage",),
        "runtime": ("Runtime", "default_runtime"),
        "saving.verbs": ("save_sharded_checkpoint", "save_sharded_model"),
        "surgery": ("set_submodule",),
        "errors": (
            "BlockConfigError",
            "CheckpointError",
            "CheckpointNotFoundError",
            "CollectiveError",
            "ConfigError",
            "FamilyError",
            "MissingKeysError",
            "OwnershipError",
            "PartialModelError",
            "PatchError",
            "ShardedCkptError",
        ),
    },
)
