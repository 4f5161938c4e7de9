"""The table in docs/training_state.md has every specified name."""

from __future__ import annotations

from pathlib import Path

from sharded_ckpt.training.audit import StrictHandling

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training_state.md"


def test_the_page_has_every_mode_and_every_specified_name():
    page = PAGE.read_text(encoding="utf-8")
    table = page[page.index("Where the names of the specifications are") :]
    assert all(f"`{mode.value}`" in page for mode in StrictHandling)
    names = """ModelState OptimizerState state_dict load_state_dict _get_base_model_state_dict _PREFIX
    _set_base_model_state_dict _refresh_local_tied_lm_head _drop_outer_prefix _add_outer_prefix
    _rename_dora_keys_to_hf _rename_dora_keys_from_hf _get_lm_head_weight_and_name _get_peft_state_dict
    _set_peft_state_dict _has_expert_parallelism _has_quantized_params _is_quantized_module
    _safe_set_extra_state _safe_op_set_extra_state _original_set_extra_state _original_op_set_extra_state
    StateDictTransforms key_filter state_dict_transform state_dict_adapter BaseStateDictAdapter ModelWrapper
    _resolve_initial_load _CheckpointLoadSpec additional_load_path apply_dtype_convert"""
    assert [name for name in names.split() if name not in table] == []
