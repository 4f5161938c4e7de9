"""What the ranks of the pipeline's tests do: load, make a stage, run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import DynamicCache

from patchers.cache_names import cache_name
from sharded_ckpt.loading.verbs import load_and_shard_model
from sharded_ckpt.pipeline import PipelineStage
from sharded_ckpt.runtime import default_runtime

Owned = Sequence[Sequence[int]] | None  # the blocks of each rank; None for "auto"


def stage_of(checkpoint: Path, owned: Owned = None, **options: Any) -> PipelineStage:
    """Return this rank's stage of a checkpoint in float32."""
    runtime = default_runtime(device="cpu", timeout=options.pop("timeout", 60))
    mine: Any = "auto" if owned is None else set(owned[dist.get_rank()])
    shard = load_and_shard_model(
        "auto", checkpoint, mine, runtime=runtime, dtype=torch.float32, progress=False, **options
    )
    return PipelineStage(shard, runtime)


def logits_of(checkpoint: Path, owned: Owned, calls: Sequence[dict[str, Any]]) -> list[torch.Tensor | None]:
    """Return the logits of each call."""
    stage = stage_of(checkpoint, owned)
    outputs = [stage(**call) for call in calls]
    return [None if output is None else output.logits for output in outputs]


def decoded(checkpoint: Path, owned: Owned, ids: torch.Tensor, prompt: int, **inputs: Any) -> list[Any]:
    """Return the logits of a prompt and of one token after the other, with a cache, on the last stage."""
    stage = stage_of(checkpoint, owned)
    cache = DynamicCache(config=stage.shard.config)
    cuts = [(0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))]
    name_of_cache, outputs = cache_name(stage.shard.forward), []
    for start, end in cuts:
        mask = {name: value[:, :end] for name, value in inputs.items()}
        outputs.append(stage(ids[:, start:end], **{name_of_cache: cache}, **mask))
    return [None if output is None else output.logits for output in outputs]


def generated(checkpoint: Path, owned: Owned, calls: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    """Return the tokens of each call of `generate`; `manual_seed` sets torch's own generator before it."""
    stage = stage_of(checkpoint, owned)
    tokens = []
    for call in calls:
        options = dict(call)
        torch.manual_seed(options.pop("manual_seed", 0))
        tokens.append(stage.generate(**options))
    return tokens
