"""Running shards one after the other in one process, as the stages of a pipeline run on their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from patchers.substitutes import UnownedBlock, armed


def run_stages(
    shards: Sequence[PreTrainedModel], caches: Sequence[Any] | None = None, **inputs: Any
) -> torch.Tensor:
    """Return the logits: each shard runs the model's own forward on what the one before gave."""
    hidden: torch.Tensor | None = None
    for number, shard in enumerate(shards):
        cache = {} if caches is None else {"past_key_values": caches[number]}
        hidden, logits = _run(shard, hidden, {**inputs, **cache})
    return logits


def _run(shard: PreTrainedModel, received: torch.Tensor | None, inputs: Any) -> tuple[torch.Tensor, Any]:
    blocks = [block for block in shard.model.layers if not isinstance(block, UnownedBlock)]
    seen: list[torch.Tensor] = []

    def receive(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return args if received is None else (received, *args[1:])

    hooks = [blocks[0].register_forward_pre_hook(receive)] if blocks else []
    hooks += [blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(out))] if blocks else []
    try:
        with armed(shard), torch.no_grad():
            output = shard(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    passed_on = seen[0] if seen else received
    assert passed_on is not None
    return passed_on, output.logits
