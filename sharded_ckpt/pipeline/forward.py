"""A forward pass over the stages, without gradients."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from patchers.cache_names import CACHE_NAMES
from sharded_ckpt.pipeline.connected_stage import ConnectedStage
from sharded_ckpt.pipeline.inputs import MicroBatches, cut, inseparable, joined, require_separable
from sharded_ckpt.pipeline.links import Links
from sharded_ckpt.pipeline.micro_batches import rows_of_pass


def forward(
    stage: ConnectedStage, given: dict[str, Any], *, broadcast: bool, micro_batches: MicroBatches
) -> Any:
    """Run the model on the same inputs on every rank. See `PipelineStage.__call__`."""
    with stage.collectively("running the pipeline"), torch.no_grad():
        as_tuple = given.get("return_dict") is False  # of which nothing could be joined or broadcast
        asked = {**given, "return_dict": True} if as_tuple else given
        inputs = stage.admit(asked, extra=[micro_batches, broadcast, as_tuple])
        whole = micro_batches == "auto" and inseparable(given)
        rows = rows_of_pass(stage, inputs, 1 if whole else micro_batches)
        require_separable(given, len(rows))
        parts = list(cut(inputs, rows))
        passes = zip(parts, stage.expecting([part["input_ids"].shape for part in parts]), strict=True)
        outputs = [stage.run(part).output for part, _ in passes if stage.body.blocks]
        if not stage.body.blocks and any(given.get(name) is not None for name in CACHE_NAMES):
            stage.body.pass_by(inputs)  # the next call compares the lengths of all caches
        result = joined(outputs) if stage.is_last else None
        if broadcast and stage.links is not None:
            result = _broadcast(result, stage.links, given.get("labels") is not None)
        stage.conclude()
    return result.to_tuple() if as_tuple and result is not None else result


def _broadcast(output: Any, links: Links, has_loss: bool) -> Any:
    """Return, on every rank, an output like that of the last stage, with its logits and its loss."""
    names = ["logits", "loss"] if has_loss else ["logits"]
    told = links.share(None if output is None else [output[name] for name in names], len(names))
    if output is not None:
        return output
    return CausalLMOutputWithPast(logits=told[0], loss=told[1] if has_loss else None)
