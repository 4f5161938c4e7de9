"""The few things about families that no rule finds out."""

from __future__ import annotations

PLAIN_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Families (config `model_type`) whose layers all have one structure, and whose checkpoints have exactly the
names, shapes and dtypes of the native modules, so that tensors can be assigned without transformers'
converters. Each member is shown by test to load bit-equal to `from_pretrained`; equal names and shapes alone
prove nothing."""

OWN_PER_LAYER_CONFIG = frozenset(
    {
        "diffusion_gemma_text",
        "dots3_note_text",
        "embedding_gemma2_text",
        "gemma4_text",
        "gemma4_unified_text",
        "neomme",
        "step3p5",
    }
)
"""Model types whose own config class fills `per_layer_config` in, and whose own modelling code builds what it
says (other head sizes in layers of full attention, say)."""

NATIVE_FAMILY = {"nemotron-nas": "llama", "deci": "llama"}
"""Published heterogeneous model types, and the native family that their blocks are built of."""
