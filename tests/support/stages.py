"""Running shards one after the other in one process, as the stages of a pipeline run on their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from patchers.cache_names import cache_name
from sharded_ckpt.pipeline.body import StageBody


def run_stages(
    shards: Sequence[PreTrainedModel],
    caches: Sequence[Any] | None = None,
    **inputs: Any,
) -> torch.Tensor:
    """Return the logits: each shard runs the model's own forward on what the one before gave."""
    hidden_states: list[torch.Tensor] = []
    logits = torch.empty(0)
    for number, shard in enumerate(shards):
        body = StageBody(shard)
        if not body.blocks:
            continue
        cache = {} if caches is None else {cache_name(shard.forward): caches[number]}
        with torch.no_grad():
            passed = body.run({**inputs, **cache}, hidden_states.pop if hidden_states else None)
        hidden_states.append(passed.hidden_states)
        logits = passed.output.logits
    return logits
