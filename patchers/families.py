"""The few things about families that no rule finds out."""

from __future__ import annotations

PLAIN_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Families (config `model_type`) whose layers all have one structure, and whose checkpoints have exactly the
names, shapes and dtypes of the native modules, so that tensors can be assigned without transformers'
converters. Each member is shown by test to load bit-equal to `from_pretrained`; equal names and shapes alone
prove nothing."""

NATIVE_FAMILY = {"nemotron-nas": "llama", "deci": "llama"}
"""Published heterogeneous model types, and the native family that their blocks are built of."""
