"""The state of training: models and optimizers in shards, what files call them, and how they get there."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from sharded_ckpt.training.adapter_files import load_adapter as load_adapter
    from sharded_ckpt.training.adapter_files import save_adapter as save_adapter
    from sharded_ckpt.training.audit import FillReport as FillReport
    from sharded_ckpt.training.audit import StrictHandling as StrictHandling
    from sharded_ckpt.training.checkpointing import TRACKER_PREFIX as TRACKER_PREFIX
    from sharded_ckpt.training.checkpointing import AsyncCallsQueue as AsyncCallsQueue
    from sharded_ckpt.training.checkpointing import AsyncRequest as AsyncRequest
    from sharded_ckpt.training.checkpointing import CheckpointCallbacks as CheckpointCallbacks
    from sharded_ckpt.training.checkpointing import CheckpointConfig as CheckpointConfig
    from sharded_ckpt.training.checkpointing import CheckpointLoadContext as CheckpointLoadContext
    from sharded_ckpt.training.checkpointing import CheckpointManager as CheckpointManager
    from sharded_ckpt.training.checkpointing import CheckpointSaveContext as CheckpointSaveContext
    from sharded_ckpt.training.checkpointing import CheckpointType as CheckpointType
    from sharded_ckpt.training.checkpointing import DefaultCheckpointManager as DefaultCheckpointManager
    from sharded_ckpt.training.checkpointing import GlobalState as GlobalState
    from sharded_ckpt.training.checkpointing import LocalCheckpointManager as LocalCheckpointManager
    from sharded_ckpt.training.checkpointing import TrainState as TrainState
    from sharded_ckpt.training.checkpointing import (
        apply_peft_adapter_filter_to_state_dict as apply_peft_adapter_filter_to_state_dict,
    )
    from sharded_ckpt.training.checkpointing import being_read as being_read
    from sharded_ckpt.training.checkpointing import (
        cleanup_old_non_persistent_checkpoint as cleanup_old_non_persistent_checkpoint,
    )
    from sharded_ckpt.training.checkpointing import create_checkpoint_manager as create_checkpoint_manager
    from sharded_ckpt.training.checkpointing import delete_extra_state as delete_extra_state
    from sharded_ckpt.training.checkpointing import find_checkpoint_rank_0 as find_checkpoint_rank_0
    from sharded_ckpt.training.checkpointing import generate_state_dict as generate_state_dict
    from sharded_ckpt.training.checkpointing import get_checkpoint_version as get_checkpoint_version
    from sharded_ckpt.training.checkpointing import get_rng_state as get_rng_state
    from sharded_ckpt.training.checkpointing import (
        get_save_and_finalize_callbacks as get_save_and_finalize_callbacks,
    )
    from sharded_ckpt.training.checkpointing import init_checkpointing_context as init_checkpointing_context
    from sharded_ckpt.training.checkpointing import is_empty_async_queue as is_empty_async_queue
    from sharded_ckpt.training.checkpointing import load_checkpoint as load_checkpoint
    from sharded_ckpt.training.checkpointing import (
        load_fsdp_dtensor_checkpoint as load_fsdp_dtensor_checkpoint,
    )
    from sharded_ckpt.training.checkpointing import maybe_finalize_async_save as maybe_finalize_async_save
    from sharded_ckpt.training.checkpointing import maybe_load_dataloader_state as maybe_load_dataloader_state
    from sharded_ckpt.training.checkpointing import maybe_save_dataloader_state as maybe_save_dataloader_state
    from sharded_ckpt.training.checkpointing import pin_checkpoint as pin_checkpoint
    from sharded_ckpt.training.checkpointing import (
        preprocess_fsdp_dtensor_state_dict as preprocess_fsdp_dtensor_state_dict,
    )
    from sharded_ckpt.training.checkpointing import read_metadata as read_metadata
    from sharded_ckpt.training.checkpointing import read_run_config as read_run_config
    from sharded_ckpt.training.checkpointing import save_checkpoint as save_checkpoint
    from sharded_ckpt.training.checkpointing import (
        save_fsdp_dtensor_checkpoint as save_fsdp_dtensor_checkpoint,
    )
    from sharded_ckpt.training.checkpointing import save_tokenizer_assets as save_tokenizer_assets
    from sharded_ckpt.training.checkpointing import schedule_async_save as schedule_async_save
    from sharded_ckpt.training.checkpointing import set_checkpoint_version as set_checkpoint_version
    from sharded_ckpt.training.checkpointing import set_rng_state as set_rng_state
    from sharded_ckpt.training.checkpointing import unpin_checkpoint as unpin_checkpoint
    from sharded_ckpt.training.converters import AdapterKeys as AdapterKeys
    from sharded_ckpt.training.converters import DoRAKeys as DoRAKeys
    from sharded_ckpt.training.converters import DropExtraState as DropExtraState
    from sharded_ckpt.training.converters import GLUInterleave as GLUInterleave
    from sharded_ckpt.training.converters import PeftNames as PeftNames
    from sharded_ckpt.training.converters import PrefixKeys as PrefixKeys
    from sharded_ckpt.training.converters import SplitGateUp as SplitGateUp
    from sharded_ckpt.training.dcp import DcpWeights as DcpWeights
    from sharded_ckpt.training.dcp import SafeFileSystemReader as SafeFileSystemReader
    from sharded_ckpt.training.dcp import SafeLoadPlanner as SafeLoadPlanner
    from sharded_ckpt.training.dcp import read_dcp_metadata as read_dcp_metadata
    from sharded_ckpt.training.export import export_checkpoint as export_checkpoint
    from sharded_ckpt.training.load_spec import LoadSpec as LoadSpec
    from sharded_ckpt.training.load_spec import resolve_initial_load as resolve_initial_load
    from sharded_ckpt.training.merged import MergedAdapters as MergedAdapters
    from sharded_ckpt.training.model_state import ModelState as ModelState
    from sharded_ckpt.training.model_wrapper import ModelWrapper as ModelWrapper
    from sharded_ckpt.training.optimizer_state import OptimizerState as OptimizerState
    from sharded_ckpt.training.quantised import BlockQuantised as BlockQuantised
    from sharded_ckpt.training.quantised import MXFP4Quantised as MXFP4Quantised
    from sharded_ckpt.training.sources import load_sources as load_sources
    from sharded_ckpt.training.state_files import StagedState as StagedState
    from sharded_ckpt.training.state_files import save_training_state as save_training_state
    from sharded_ckpt.training.state_reading import StoredState as StoredState
    from sharded_ckpt.training.state_reading import load_training_state as load_training_state
    from sharded_ckpt.training.transforms import BaseStateDictAdapter as BaseStateDictAdapter
    from sharded_ckpt.training.transforms import StateDictConverter as StateDictConverter
    from sharded_ckpt.training.transforms import StateDictMode as StateDictMode
    from sharded_ckpt.training.transforms import StateDictTransforms as StateDictTransforms
    from sharded_ckpt.training.transforms import StorageConverter as StorageConverter

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "adapter_files": ("load_adapter", "save_adapter"),
        "dcp": ("DcpWeights", "SafeFileSystemReader", "SafeLoadPlanner", "read_dcp_metadata"),
        "export": ("export_checkpoint",),
        "load_spec": ("LoadSpec", "resolve_initial_load"),
        "merged": ("MergedAdapters",),
        "quantised": ("BlockQuantised", "MXFP4Quantised"),
        "sources": ("load_sources",),
        "audit": ("FillReport", "StrictHandling"),
        "checkpointing": (
            "AsyncCallsQueue",
            "AsyncRequest",
            "CheckpointCallbacks",
            "CheckpointConfig",
            "CheckpointLoadContext",
            "CheckpointManager",
            "CheckpointSaveContext",
            "CheckpointType",
            "DefaultCheckpointManager",
            "GlobalState",
            "LocalCheckpointManager",
            "TRACKER_PREFIX",
            "TrainState",
            "apply_peft_adapter_filter_to_state_dict",
            "being_read",
            "cleanup_old_non_persistent_checkpoint",
            "create_checkpoint_manager",
            "delete_extra_state",
            "find_checkpoint_rank_0",
            "generate_state_dict",
            "get_checkpoint_version",
            "get_rng_state",
            "get_save_and_finalize_callbacks",
            "init_checkpointing_context",
            "is_empty_async_queue",
            "load_checkpoint",
            "load_fsdp_dtensor_checkpoint",
            "maybe_finalize_async_save",
            "maybe_load_dataloader_state",
            "maybe_save_dataloader_state",
            "pin_checkpoint",
            "preprocess_fsdp_dtensor_state_dict",
            "read_metadata",
            "read_run_config",
            "save_checkpoint",
            "save_fsdp_dtensor_checkpoint",
            "save_tokenizer_assets",
            "schedule_async_save",
            "set_checkpoint_version",
            "set_rng_state",
            "unpin_checkpoint",
        ),
        "converters": (
            "AdapterKeys",
            "DoRAKeys",
            "DropExtraState",
            "GLUInterleave",
            "PeftNames",
            "PrefixKeys",
            "SplitGateUp",
        ),
        "model_state": ("ModelState",),
        "model_wrapper": ("ModelWrapper",),
        "optimizer_state": ("OptimizerState",),
        "state_files": ("StagedState", "save_training_state"),
        "state_reading": ("StoredState", "load_training_state"),
        "transforms": (
            "BaseStateDictAdapter",
            "StateDictConverter",
            "StateDictMode",
            "StateDictTransforms",
            "StorageConverter",
        ),
    },
)
