"""Checkpoints of a training: when and where they are saved, what belongs to them, which one is loaded."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from sharded_ckpt.training.checkpointing.async_calls import AsyncCallsQueue as AsyncCallsQueue
    from sharded_ckpt.training.checkpointing.async_calls import AsyncRequest as AsyncRequest
    from sharded_ckpt.training.checkpointing.async_calls import (
        get_save_and_finalize_callbacks as get_save_and_finalize_callbacks,
    )
    from sharded_ckpt.training.checkpointing.async_calls import is_empty_async_queue as is_empty_async_queue
    from sharded_ckpt.training.checkpointing.async_calls import (
        maybe_finalize_async_save as maybe_finalize_async_save,
    )
    from sharded_ckpt.training.checkpointing.async_calls import schedule_async_save as schedule_async_save
    from sharded_ckpt.training.checkpointing.config import CheckpointConfig as CheckpointConfig
    from sharded_ckpt.training.checkpointing.contexts import CheckpointLoadContext as CheckpointLoadContext
    from sharded_ckpt.training.checkpointing.contexts import CheckpointSaveContext as CheckpointSaveContext
    from sharded_ckpt.training.checkpointing.contexts import CheckpointType as CheckpointType
    from sharded_ckpt.training.checkpointing.dataloader_state import (
        maybe_load_dataloader_state as maybe_load_dataloader_state,
    )
    from sharded_ckpt.training.checkpointing.dataloader_state import (
        maybe_save_dataloader_state as maybe_save_dataloader_state,
    )
    from sharded_ckpt.training.checkpointing.fsdp_dtensor import (
        _create_fsdp_dtensor_storage_writer as _create_fsdp_dtensor_storage_writer,
    )
    from sharded_ckpt.training.checkpointing.fsdp_dtensor import (
        load_fsdp_dtensor_checkpoint as load_fsdp_dtensor_checkpoint,
    )
    from sharded_ckpt.training.checkpointing.fsdp_dtensor import (
        preprocess_fsdp_dtensor_state_dict as preprocess_fsdp_dtensor_state_dict,
    )
    from sharded_ckpt.training.checkpointing.fsdp_dtensor import (
        save_fsdp_dtensor_checkpoint as save_fsdp_dtensor_checkpoint,
    )
    from sharded_ckpt.training.checkpointing.glu_interleave import (
        _apply_glu_interleave_to_tensor_data as _apply_glu_interleave_to_tensor_data,
    )
    from sharded_ckpt.training.checkpointing.glu_interleave import (
        _deinterleave_glu_tensor as _deinterleave_glu_tensor,
    )
    from sharded_ckpt.training.checkpointing.glu_interleave import (
        _get_model_glu_interleave_sizes as _get_model_glu_interleave_sizes,
    )
    from sharded_ckpt.training.checkpointing.glu_interleave import (
        _interleave_glu_tensor as _interleave_glu_tensor,
    )
    from sharded_ckpt.training.checkpointing.glu_interleave import (
        _is_swiglu_fc1_checkpoint_key as _is_swiglu_fc1_checkpoint_key,
    )
    from sharded_ckpt.training.checkpointing.glu_interleave import (
        _process_state_dict_for_glu_interleaving as _process_state_dict_for_glu_interleaving,
    )
    from sharded_ckpt.training.checkpointing.glu_interleave import (
        _process_state_dict_for_model_glu_interleaving as _process_state_dict_for_model_glu_interleaving,
    )
    from sharded_ckpt.training.checkpointing.layout import (
        _DIRECT_ITERATION_DIR_SENTINEL as _DIRECT_ITERATION_DIR_SENTINEL,
    )
    from sharded_ckpt.training.checkpointing.layout import (
        _NON_PERSISTENT_CKPT_SUBDIR as _NON_PERSISTENT_CKPT_SUBDIR,
    )
    from sharded_ckpt.training.checkpointing.layout import TRACKER_PREFIX as TRACKER_PREFIX
    from sharded_ckpt.training.checkpointing.layout import _get_checkpoint_format as _get_checkpoint_format
    from sharded_ckpt.training.checkpointing.layout import find_checkpoint_rank_0 as find_checkpoint_rank_0
    from sharded_ckpt.training.checkpointing.legacy import (
        _extract_megatron_lm_args_from_state_dict as _extract_megatron_lm_args_from_state_dict,
    )
    from sharded_ckpt.training.checkpointing.legacy import get_checkpoint_version as get_checkpoint_version
    from sharded_ckpt.training.checkpointing.legacy import set_checkpoint_version as set_checkpoint_version
    from sharded_ckpt.training.checkpointing.loading import (
        _load_checkpoint_from_path as _load_checkpoint_from_path,
    )
    from sharded_ckpt.training.checkpointing.loading import load_checkpoint as load_checkpoint
    from sharded_ckpt.training.checkpointing.local import LocalCheckpointManager as LocalCheckpointManager
    from sharded_ckpt.training.checkpointing.local import (
        _get_non_persistent_iteration as _get_non_persistent_iteration,
    )
    from sharded_ckpt.training.checkpointing.local import (
        init_checkpointing_context as init_checkpointing_context,
    )
    from sharded_ckpt.training.checkpointing.manager import CheckpointCallbacks as CheckpointCallbacks
    from sharded_ckpt.training.checkpointing.manager import CheckpointManager as CheckpointManager
    from sharded_ckpt.training.checkpointing.manager import (
        DefaultCheckpointManager as DefaultCheckpointManager,
    )
    from sharded_ckpt.training.checkpointing.manager import (
        create_checkpoint_manager as create_checkpoint_manager,
    )
    from sharded_ckpt.training.checkpointing.resolution import (
        _resolve_checkpoint_iteration as _resolve_checkpoint_iteration,
    )
    from sharded_ckpt.training.checkpointing.retention import being_read as being_read
    from sharded_ckpt.training.checkpointing.retention import (
        cleanup_old_non_persistent_checkpoint as cleanup_old_non_persistent_checkpoint,
    )
    from sharded_ckpt.training.checkpointing.retention import pin_checkpoint as pin_checkpoint
    from sharded_ckpt.training.checkpointing.retention import unpin_checkpoint as unpin_checkpoint
    from sharded_ckpt.training.checkpointing.rng_state import get_rng_state as get_rng_state
    from sharded_ckpt.training.checkpointing.rng_state import set_rng_state as set_rng_state
    from sharded_ckpt.training.checkpointing.run_config import read_run_config as read_run_config
    from sharded_ckpt.training.checkpointing.saving import save_checkpoint as save_checkpoint
    from sharded_ckpt.training.checkpointing.state_dict import (
        _build_sharded_state_dict_metadata as _build_sharded_state_dict_metadata,
    )
    from sharded_ckpt.training.checkpointing.state_dict import (
        _generate_model_state_dict as _generate_model_state_dict,
    )
    from sharded_ckpt.training.checkpointing.state_dict import _is_model_section as _is_model_section
    from sharded_ckpt.training.checkpointing.state_dict import (
        _load_model_state_dict as _load_model_state_dict,
    )
    from sharded_ckpt.training.checkpointing.state_dict import (
        apply_peft_adapter_filter_to_state_dict as apply_peft_adapter_filter_to_state_dict,
    )
    from sharded_ckpt.training.checkpointing.state_dict import delete_extra_state as delete_extra_state
    from sharded_ckpt.training.checkpointing.state_dict import generate_state_dict as generate_state_dict
    from sharded_ckpt.training.checkpointing.tokenizer_assets import (
        save_tokenizer_assets as save_tokenizer_assets,
    )
    from sharded_ckpt.training.checkpointing.trackers import read_metadata as read_metadata
    from sharded_ckpt.training.checkpointing.train_state import GlobalState as GlobalState
    from sharded_ckpt.training.checkpointing.train_state import TrainState as TrainState
    from sharded_ckpt.training.checkpointing.train_state import (
        _get_train_state_from_state_dict as _get_train_state_from_state_dict,
    )
    from sharded_ckpt.training.checkpointing.weights_only import (
        _load_model_weights_from_checkpoint as _load_model_weights_from_checkpoint,
    )

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "async_calls": (
            "AsyncCallsQueue",
            "AsyncRequest",
            "get_save_and_finalize_callbacks",
            "is_empty_async_queue",
            "maybe_finalize_async_save",
            "schedule_async_save",
        ),
        "config": ("CheckpointConfig",),
        "contexts": ("CheckpointLoadContext", "CheckpointSaveContext", "CheckpointType"),
        "dataloader_state": ("maybe_load_dataloader_state", "maybe_save_dataloader_state"),
        "fsdp_dtensor": (
            "_create_fsdp_dtensor_storage_writer",
            "load_fsdp_dtensor_checkpoint",
            "preprocess_fsdp_dtensor_state_dict",
            "save_fsdp_dtensor_checkpoint",
        ),
        "glu_interleave": (
            "_apply_glu_interleave_to_tensor_data",
            "_deinterleave_glu_tensor",
            "_get_model_glu_interleave_sizes",
            "_interleave_glu_tensor",
            "_is_swiglu_fc1_checkpoint_key",
            "_process_state_dict_for_glu_interleaving",
            "_process_state_dict_for_model_glu_interleaving",
        ),
        "layout": (
            "TRACKER_PREFIX",
            "_DIRECT_ITERATION_DIR_SENTINEL",
            "_NON_PERSISTENT_CKPT_SUBDIR",
            "_get_checkpoint_format",
            "find_checkpoint_rank_0",
        ),
        "legacy": (
            "_extract_megatron_lm_args_from_state_dict",
            "get_checkpoint_version",
            "set_checkpoint_version",
        ),
        "loading": ("_load_checkpoint_from_path", "load_checkpoint"),
        "local": ("_get_non_persistent_iteration", "LocalCheckpointManager", "init_checkpointing_context"),
        "manager": (
            "CheckpointCallbacks",
            "CheckpointManager",
            "DefaultCheckpointManager",
            "create_checkpoint_manager",
        ),
        "resolution": ("_resolve_checkpoint_iteration",),
        "retention": (
            "being_read",
            "cleanup_old_non_persistent_checkpoint",
            "pin_checkpoint",
            "unpin_checkpoint",
        ),
        "rng_state": ("get_rng_state", "set_rng_state"),
        "run_config": ("read_run_config",),
        "saving": ("save_checkpoint",),
        "state_dict": (
            "_build_sharded_state_dict_metadata",
            "_generate_model_state_dict",
            "_is_model_section",
            "_load_model_state_dict",
            "apply_peft_adapter_filter_to_state_dict",
            "delete_extra_state",
            "generate_state_dict",
        ),
        "tokenizer_assets": ("save_tokenizer_assets",),
        "trackers": ("read_metadata",),
        "train_state": ("GlobalState", "TrainState", "_get_train_state_from_state_dict"),
        "weights_only": ("_load_model_weights_from_checkpoint",),
    },
)
