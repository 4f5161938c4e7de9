"""The names of NeMo Automodel's `stateful_wrappers`, for those who look for them there."""

from sharded_ckpt.training.adapters import _get_peft_state_dict as _get_peft_state_dict
from sharded_ckpt.training.adapters import _set_peft_state_dict as _set_peft_state_dict
from sharded_ckpt.training.key_names import _PREFIX as _PREFIX
from sharded_ckpt.training.key_names import _add_outer_prefix as _add_outer_prefix
from sharded_ckpt.training.key_names import _drop_outer_prefix as _drop_outer_prefix
from sharded_ckpt.training.key_names import _rename_dora_keys_from_hf as _rename_dora_keys_from_hf
from sharded_ckpt.training.key_names import _rename_dora_keys_to_hf as _rename_dora_keys_to_hf
from sharded_ckpt.training.model_state import ModelState as ModelState
from sharded_ckpt.training.module_kinds import _has_expert_parallelism as _has_expert_parallelism
from sharded_ckpt.training.module_kinds import _has_quantized_params as _has_quantized_params
from sharded_ckpt.training.module_kinds import _is_quantized_module as _is_quantized_module
from sharded_ckpt.training.optimizer_state import OptimizerState as OptimizerState
from sharded_ckpt.training.tied_head import _get_lm_head_weight_and_name as _get_lm_head_weight_and_name
from sharded_ckpt.training.tied_head import has_local_tied_lm_head as has_local_tied_lm_head
from sharded_ckpt.training.tied_head import is_tied_word_embeddings as is_tied_word_embeddings
