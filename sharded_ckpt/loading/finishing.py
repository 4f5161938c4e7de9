"""What a filled shard still needs: its generation config, and the account of what was cast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from sharded_ckpt.checkpoint.source import TensorSource
from sharded_ckpt.loading.plan import LoadPlan


def read_generation_config(model: PreTrainedModel, source: TensorSource) -> GenerationConfig | None:
    """Return the generation config of a checkpoint; without it, eos and temperature would change.

    Args:
        model: What is loaded; None is returned if it does not generate.
        source: The checkpoint.
    """
    if not model.can_generate():
        return None
    files = {
        "generation_config.json": {},
        "config.json": {"_from_model_config": True},
    }  # as from_pretrained
    name = next((name for name in files if source.exists(name)), None)
    if name is None:
        return GenerationConfig.from_model_config(model.config)
    folder = source.local_path(name).parent
    read: Any = GenerationConfig.from_pretrained
    found: GenerationConfig = read(folder, name, **files[name])
    return found


def casts_of(
    plan: LoadPlan, found: Mapping[str, torch.dtype], made: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, tuple[str, ...]]:
    """Return the names of the tensors that were cast to a model's dtype, by `"found -> made"`.

    Those that a family always keeps in another one (routers in float32) are not among them.
    """
    casts: dict[str, dict[str, None]] = {}
    for name, key in plan.sources.items():
        target = plan.target(name)
        if key in found and target in made and found[key] != made[target].dtype == dtype:
            kind = f"{found[key]} -> {made[target].dtype}".replace("torch.", "")
            casts.setdefault(kind, {})[target] = None
    return {kind: tuple(names) for kind, names in casts.items()}
