"""Measuring how long this rank takes for a step of decoding, by the rows of a micro-batch."""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sharded_ckpt.checkpoint.coordinator import together
from sharded_ckpt.pipeline.body import StageBody
from sharded_ckpt.pipeline.cache import with_room
from sharded_ckpt.pipeline.inputs import CACHES
from sharded_ckpt.pipeline.schedule import best_rows, sizes_to_measure

if TYPE_CHECKING:
    from sharded_ckpt.pipeline.stage import PipelineStage

_RUNS = 4

_known: WeakKeyDictionary[PipelineStage, dict[tuple[int, int], list[int]]] = WeakKeyDictionary()


def measured_rows(stage: PipelineStage, batch: int, length: int) -> list[int]:
    """Return into how many rows to cut a batch for decoding; collective.

    It is measured once for a batch and a length, up to the next power of two.

    Args:
        stage: This rank's.
        batch: Rows altogether.
        length: Tokens that are in the cache by then.
    """
    if len(stage.lineup.ranks) == 1 or batch == 1:
        return [batch]
    known, tokens = _known.setdefault(stage, {}), 1 << (length - 1).bit_length()
    if (batch, tokens) not in known:
        known[batch, tokens] = _measure_rows(stage, batch, tokens)
    return known[batch, tokens]


def _measure_rows(stage: PipelineStage, batch: int, length: int) -> list[int]:
    stages = len(stage.lineup.ranks)
    sizes, control = sizes_to_measure(batch, stages), stage.runtime.control
    with together(control, "measuring the steps of micro-batches"):
        times = [step_seconds_of(stage.body, rows, length) if stage.body.blocks else 0.0 for rows in sizes]
    told = control.gather(times, "comparing the steps of micro-batches")
    return best_rows(batch, [dict(zip(sizes, told[rank], strict=True)) for rank in stage.lineup.ranks])


def step_seconds_of(body: StageBody, rows: int, length: int) -> float:
    """Return the seconds of one step: the fastest of a few, after one that warms up.

    Args:
        body: The blocks.
        rows: Sequences that take the step together.
        length: Tokens that each of them has in the cache.
    """
    device = next(body.shard.parameters()).device
    inputs: dict[str, Any] = {"input_ids": torch.zeros(rows, 1, dtype=torch.int64, device=device)}
    parameters = inspect.signature(body.shard.forward).parameters
    if "logits_to_keep" in parameters:
        inputs["logits_to_keep"] = 1
    made = body.run(inputs | {"use_cache": True}).output
    name = next((name for name in CACHES if made.get(name) is not None), None)
    if name is not None:
        inputs |= {name: made[name], "use_cache": True}
        if type(made[name]) is DynamicCache:
            inputs[name] = with_room(DynamicCache(config=body.shard.config.get_text_config(decoder=True)))
    _seconds(body, inputs)
    for layer in getattr(inputs.get(name or ""), "layers", ()):
        if isinstance(layer, DynamicLayer) and layer.keys is not None and length > 1:
            layer.update(*(held.expand(-1, -1, length, -1) for held in _first(layer)))
    return min(_seconds(body, inputs) for _ in range(_RUNS))


def _first(layer: DynamicLayer) -> list[torch.Tensor]:
    return [held[..., :1, :] for held in (layer.keys, layer.values) if held is not None]


def _seconds(body: StageBody, inputs: dict[str, Any]) -> float:
    began = time.perf_counter()
    body.run(inputs)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - began
