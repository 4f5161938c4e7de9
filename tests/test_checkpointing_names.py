"""Every public name of the specification is there, with the parameters that it gives it."""

from __future__ import annotations

import inspect

import pytest

from sharded_ckpt.training import checkpointing

SIGNATURES = {
    "CheckpointManager.finalize_async_saves": "self state blocking terminate",
    "CheckpointManager.load": "self ctx",
    "CheckpointManager.save": "self ctx callback_manager",
    "DefaultCheckpointManager": "checkpoint_config",
    "DefaultCheckpointManager.finalize_async_saves": "self state blocking terminate",
    "DefaultCheckpointManager.load": "self ctx",
    "DefaultCheckpointManager.save": "self ctx callback_manager",
    "_apply_glu_interleave_to_tensor_data": "tensor interleave_size interleave",
    "_build_sharded_state_dict_metadata": "use_distributed_optimizer cfg",
    "_create_fsdp_dtensor_storage_writer": "checkpoint_path",
    "_deinterleave_glu_tensor": "tensor interleave_size",
    "_extract_megatron_lm_args_from_state_dict": "state_dict",
    "_generate_model_state_dict": "model model_sd_kwargs ckpt_format",
    "_get_checkpoint_format": "checkpoint_path",
    "_get_model_glu_interleave_sizes": "model cfg",
    "_get_non_persistent_iteration": "non_persistent_global_dir non_persistent_ckpt_type "
    "checkpointing_context",
    "_get_train_state_from_state_dict": "state_dict",
    "_interleave_glu_tensor": "tensor interleave_size",
    "_is_model_section": "section_key",
    "_is_swiglu_fc1_checkpoint_key": "key",
    "_load_checkpoint_from_path": "load_dir state model optimizer opt_param_scheduler strict "
    "checkpointing_context skip_load_to_model_and_opt ignore_ckpt_step pg_collection module_name",
    "_load_model_state_dict": "module state_dict strict",
    "_load_model_weights_from_checkpoint": "checkpoint_path model fully_parallel_load return_state_dict "
    "dist_ckpt_strictness strict",
    "_process_state_dict_for_glu_interleaving": "model_state_dict interleave_size interleave "
    "use_megatron_fsdp include_routed_experts include_shared_experts include_dense",
    "_process_state_dict_for_model_glu_interleaving": "model_state_dict routed_interleave_size "
    "shared_interleave_size interleave use_megatron_fsdp",
    "_resolve_checkpoint_iteration": "load_dir ckpt_step_override",
    "apply_peft_adapter_filter_to_state_dict": "state_dict peft_config",
    "cleanup_old_non_persistent_checkpoint": "save_dir leave_ckpt_num do_async",
    "create_checkpoint_manager": "checkpoint_config",
    "delete_extra_state": "state_dict",
    "find_checkpoint_rank_0": "checkpoints_path iteration release",
    "generate_state_dict": "ckpt_cfg model optimizer opt_param_scheduler rng_state iteration "
    "optim_sd_kwargs model_sd_kwargs rerun_state",
    "get_checkpoint_version": "",
    "get_rng_state": "data_parallel_random_init ckpt_format",
    "get_save_and_finalize_callbacks": "writer save_state_dict_ret",
    "init_checkpointing_context": "checkpoint_config",
    "is_empty_async_queue": "global_state",
    "load_checkpoint": "state model optimizer opt_param_scheduler strict checkpointing_context "
    "skip_load_to_model_and_opt pg_collection module_name",
    "load_fsdp_dtensor_checkpoint": "load_dir ckpt_cfg rank0 sharded_state_dict iteration release "
    "checkpoint_path_override checkpointing_context cfg",
    "maybe_finalize_async_save": "global_state ckpt_cfg blocking terminate",
    "maybe_save_dataloader_state": "model train_iterator iteration dataloader_save_path",
    "preprocess_fsdp_dtensor_state_dict": "cfg raw_state_dict model",
    "read_metadata": "tracker_filename",
    "save_checkpoint": "state model optimizer opt_param_scheduler num_floating_point_operations_so_far "
    "checkpointing_context pipeline_rank tensor_rank non_persistent_ckpt train_data_iterator "
    "preprocess_common_state_dict_fn prebuilt_state_dict pg_collection callback_manager module_name",
    "save_tokenizer_assets": "tokenizer tokenizer_config checkpoint_path",
    "schedule_async_save": "global_state async_request",
    "set_checkpoint_version": "value",
}
BY_KEYWORD = {
    "_generate_model_state_dict": "pg_collection",
    "_is_swiglu_fc1_checkpoint_key": "include_routed_experts include_shared_experts include_dense",
    "generate_state_dict": "pg_collection",
    "get_rng_state": "pg_collection module_name",
    "maybe_save_dataloader_state": "pg_collection",
    "save_fsdp_dtensor_checkpoint": "cfg model storage_writer barrier",
}
FIELDS = {
    "CheckpointSaveContext": "state model optimizer opt_param_scheduler num_floating_point_operations_so_far "
    "train_data_iterator non_persistent_ckpt pg_collection module_name",
    "CheckpointLoadContext": "state model optimizer opt_param_scheduler strict skip_load_to_model_and_opt "
    "pg_collection module_name",
}


def found(name: str) -> object:
    value: object = checkpointing
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_specified_parameters_come_first_and_extras_have_defaults(name: str) -> None:
    parameters = list(inspect.signature(found(name)).parameters.values())  # type: ignore[arg-type]
    specified = SIGNATURES[name].split()
    assert [p.name for p in parameters[: len(specified)]] == specified
    keywords = BY_KEYWORD.get(name, "").split()
    extras = parameters[len(specified) :]
    assert {p.name for p in extras} >= set(keywords)
    assert all(p.name in keywords or p.default is not p.empty for p in extras)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_contexts_have_the_specified_fields_in_their_order(name: str) -> None:
    fields = list(inspect.signature(found(name)).parameters)  # type: ignore[arg-type]
    specified = FIELDS[name].split()
    assert fields[: len(specified)] == specified


def test_names_that_are_no_functions_are_there() -> None:
    assert checkpointing.TRACKER_PREFIX == "latest"
    assert checkpointing._NON_PERSISTENT_CKPT_SUBDIR == "non_persistent"
    assert checkpointing._DIRECT_ITERATION_DIR_SENTINEL == -2
    assert [kind.name for kind in checkpointing.CheckpointType] == ["LOCAL", "GLOBAL", "FSDP_DTENSOR"]
    signature = inspect.signature(checkpointing.save_fsdp_dtensor_checkpoint)
    assert list(signature.parameters) == [
        *("checkpoint_path", "state_dict"),
        *BY_KEYWORD["save_fsdp_dtensor_checkpoint"].split(),
    ]
