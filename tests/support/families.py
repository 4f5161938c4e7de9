"""A tiny config of every family that is tried: four layers or so, hidden size 64, a vocabulary of 128.

An entry says only what its family needs beside the common sizes, of which each config class takes those that
are fields of it.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any
from zlib import crc32

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from support.tiny import draw

LAYERS = 4
_TURNS = ["sliding_attention", "full_attention"] * 2
_LINEAR_TURNS = ["linear_attention", "full_attention"] * 2

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # the same under the names of gpt2, opt, falcon, mpt and their kin
    "n_embd": 64,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_inner": 96,
    "n_positions": 128,
    "n_layers": LAYERS,
    "n_heads": 4,
    "d_model": 64,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "num_kv_heads": 2,
    "word_embed_proj_dim": 64,
    "rotary_dim": 8,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    # state-space and linear-attention mixers
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

TEXT_FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "bloom": {},
    "cohere": {},
    "cohere2": {"layer_types": _TURNS},
    "dbrx": {
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "ernie4_5": {},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
        "moe_layer_interval": 1,
    },
    "exaone4": {"layer_types": _TURNS},
    "falcon": {"new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma": {},
    "gemma2": {"layer_types": _TURNS},
    "gemma3_text": {"layer_types": _TURNS},
    "gemma3n_text": {
        "intermediate_size": [96] * LAYERS,
        "layer_types": _TURNS,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gemma4_text": {
        "layer_types": _TURNS,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 2,
        "enable_moe_block": False,
    },
    "glm4": {},
    "glm4_moe": {},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {"layer_types": _TURNS},
    "gptj": {},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 48},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8},
    "llama": {},
    "llama4_text": {
        "intermediate_size_mlp": 96,
        "no_rope_layers": [1, 1, 1, 0],
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
    },
    "mamba": {"state_size": 8, "intermediate_size": 128, "time_step_rank": 4},
    "mamba2": {"num_heads": 8, "state_size": 8, "expand": 2},
    "minimax": {"layer_types": _LINEAR_TURNS, "block_size": 8},
    "minimax_m2": {},
    "mistral": {},
    "mixtral": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "hybrid_override_pattern": None,
        "moe_shared_expert_intermediate_size": 48,
        "n_shared_experts": 1,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": {"layer_types": _TURNS},
    "olmoe": {},
    "opt": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": {"layer_types": _LINEAR_TURNS},
    "qwen3_5_text": {"layer_types": _LINEAR_TURNS},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": _LINEAR_TURNS, "decoder_sparse_step": 1},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "stablelm": {},
    "starcoder2": {},
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "mamba_headdim": 16,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "adapter_rank": 8,
    },
}
"""The families of causal language models that are tried, and what their configs say beside the common
sizes."""

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64}
_QWEN3_VISION = {
    **_QWEN_VISION,
    "intermediate_size": 48,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
_VIT = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}

VISION_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {"vision_config": {**_VIT, "image_size": 28, "patch_size": 7}, "mm_tokens_per_image": 4},
    "llama4": {
        "vision_config": {
            **_VIT,
            "image_size": 28,
            "patch_size": 7,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            # the pixel shuffle gathers four patches into one
            "pixel_shuffle_ratio": 0.5,
        }
    },
    "llava": {"vision_config": {**_VIT, "image_size": 28, "patch_size": 7, "projection_dim": 32}},
    "llava_onevision": {"vision_config": {**_VIT, "image_size": 28, "patch_size": 7}},
    "mistral3": {"vision_config": {**_VIT, "image_size": 28, "patch_size": 7, "head_dim": 16}},
    "paligemma": {"vision_config": {**_VIT, "image_size": 28, "patch_size": 7, "projection_dim": 64}},
    "qwen2_5_vl": {
        "text_config": _MROPE,
        "vision_config": {**_QWEN_VISION, "intermediate_size": 48, "fullatt_block_indexes": [1]},
    },
    "qwen2_vl": {
        "text_config": _MROPE,
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    },
    "qwen3_5": {"text_config": {"layer_types": _LINEAR_TURNS}, "vision_config": _QWEN3_VISION},
    "qwen3_vl": {"text_config": _MROPE, "vision_config": _QWEN3_VISION},
    "qwen3_vl_moe": {"text_config": _MROPE, "vision_config": _QWEN3_VISION},
}
"""The families of vision-language models that are tried, and what their configs say beside the common
sizes."""


NOT_CACHED = {
    "minimax": "its linear attention decodes otherwise than it prefills",
    "paligemma": "a prompt is attended to in both directions",
}
"""Families whose own native model decodes otherwise with a cache, or in a padded batch, and why."""

_BROKEN = {("llama4", "5.24.0"): "the class with a vision tower asks its language model for image_outputs"}


def why_not_run(family: str) -> str | None:
    """Why a release of transformers cannot run its own model of a family; None if it can."""
    why = _BROKEN.get((family, transformers.__version__))
    return why and f"plain transformers {transformers.__version__} cannot run {family}: {why}"


def family_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The tiny config of a family; `changes` are fields of it, or of its text config if it has one."""
    if family in VISION_FAMILIES:
        return _vision_config(family, changes)
    return _config_class(family)(**_settings(family, {**TEXT_FAMILIES.get(family, {}), **changes}))


def family_model(
    family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """The tiny native model of a family, in eval mode, with weights drawn as those of `tiny_model`."""
    return drawn_model(family_config(family, **changes), dtype=dtype, seed=seed)


def drawn_model(
    config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """The native model of a config, in eval mode, with weights drawn as those of `tiny_model`.

    A config is not changed by the model that is built of it.
    """
    auto = AutoModelForImageTextToText if config.model_type in VISION_FAMILIES else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        model = auto.from_config(copy.deepcopy(config), dtype=dtype)
    redraw(model, seed)
    return model.eval()


def redraw(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew, each from its own name: equal names and shapes get equal values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = draw({name: tuple(parameter.shape)}, parameter.dtype, seed + crc32(name.encode()))
            parameter.copy_(drawn[name])


def _vision_config(family: str, changes: dict[str, Any]) -> PreTrainedConfig:
    settings = copy.deepcopy(VISION_FAMILIES[family])
    config_class = _config_class(family)
    text = config_class().get_text_config()
    changes = {**settings.pop("text_config", {}), **changes}
    text_fields = _settings(text.model_type, {**TEXT_FAMILIES.get(text.model_type, {}), **changes})
    known = _field_names(config_class)
    ends = {name: _COMMON[name] for name in ("pad_token_id", "tie_word_embeddings") if name in known}
    return config_class(text_config={"model_type": text.model_type, **text_fields}, **ends, **settings)


def _config_class(family: str) -> Any:
    return CONFIG_MAPPING[family]


def _settings(family: str, own: dict[str, Any]) -> dict[str, Any]:
    """The common sizes that a config class knows, each under its own name, and on top what is said here."""
    config_class = _config_class(family)
    aliases = getattr(config_class, "attribute_map", {})
    known = _field_names(config_class)
    common = {aliases.get(name, name): value for name, value in reversed(_COMMON.items()) if name in known}
    return common | {aliases.get(name, name): value for name, value in own.items()}


def _field_names(config_class: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
