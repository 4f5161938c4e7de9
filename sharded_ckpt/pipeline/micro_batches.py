"""Into how many rows a batch is cut: as the caller says, or by measured times of this rank's blocks."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from patchers.cache_names import cache_name, cache_of
from sharded_ckpt.checkpoint.coordinator import together
from sharded_ckpt.pipeline.body import StageBody
from sharded_ckpt.pipeline.cache import with_room
from sharded_ckpt.pipeline.inputs import MicroBatches, cut, sizes_of
from sharded_ckpt.pipeline.schedule import best_rows, pass_seconds, sizes_to_measure, step_seconds

if TYPE_CHECKING:
    from sharded_ckpt.pipeline.connected_stage import ConnectedStage

_STEPS, _PASSES = 2, 1  # each time that a size has its turn; the fastest of all counts
_MOST_OF_STEP, _MOST_OF_PASS = 2, 4  # micro-batches for each stage; a pass has to fill and drain the stages

_known: WeakKeyDictionary[ConnectedStage, dict[Hashable, list[int]]] = WeakKeyDictionary()

Clock = Callable[[int], float]
"""Seconds that this rank's blocks take, by rows."""


def rows_of_pass(stage: ConnectedStage, inputs: Mapping[str, Any], micro_batches: MicroBatches) -> list[int]:
    """Return into how many rows to cut the inputs of a pass; collective if it is to be measured.

    It is measured once for a batch and a length, up to the next power of two.

    Args:
        stage: This rank's.
        inputs: Of the pass; some of their rows are run to measure.
        micro_batches: How many, the rows of each, or "auto".

    Raises:
        ConfigError: They are not the rows of this batch.
    """
    batch, length = inputs["input_ids"].shape
    if micro_batches != "auto":
        return sizes_of(micro_batches, batch)

    def clock(rows: int) -> float:
        part = next(cut(inputs, [rows, batch - rows] if rows < batch else [batch]))
        return min(_seconds(stage.body, part) for _ in range(_PASSES))

    known_as = "pass", batch, _rounded(length)
    return _measured(stage, known_as, batch, clock, pass_seconds, _MOST_OF_PASS)


def rows_of_step(
    stage: ConnectedStage, batch: int, length: int, micro_batches: MicroBatches = "auto"
) -> list[int]:
    """Return into how many rows to cut a batch for decoding; collective if it is to be measured.

    It is measured once for a batch and a length, up to the next power of two.

    Args:
        stage: This rank's.
        batch: Rows altogether.
        length: Tokens that are in the cache by then.
        micro_batches: How many, the rows of each, or "auto".

    Raises:
        ConfigError: They are not the rows of this batch.
    """
    if micro_batches != "auto":
        return sizes_of(micro_batches, batch)
    known_as = "step", batch, _rounded(length)
    clock = partial(_step, stage.body, length=_rounded(length), device=stage.runtime.device)
    return _measured(stage, known_as, batch, clock, step_seconds, _MOST_OF_STEP)


def _measured(
    stage: ConnectedStage,
    known_as: Hashable,
    batch: int,
    clock: Clock,
    seconds: Callable[..., float],
    most_of_stage: int,
) -> list[int]:
    ranks, control = stage.lineup.ranks, stage.runtime.control
    if len(ranks) == 1 or batch == 1:
        return [batch]
    known = _known.setdefault(stage, {})
    if known_as not in known:
        most = most_of_stage * len(ranks)
        sizes = sizes_to_measure(batch, most)
        with together(control, "measuring micro-batches"):
            times = _forth_and_back(clock, sizes) if stage.body.blocks else [0.0] * len(sizes)
        told = control.gather(times, "comparing micro-batches")
        curves = [dict(zip(sizes, told[rank], strict=True)) for rank in ranks]
        known[known_as] = best_rows(batch, curves, most, seconds)
    return known[known_as]


def _forth_and_back(clock: Clock, sizes: Sequence[int]) -> list[float]:
    """Return the time of each size; a slow moment of the machine shall not decide between them."""
    forth = [clock(rows) for rows in sizes]
    back = [clock(rows) for rows in reversed(sizes)]
    return list(map(min, forth, reversed(back)))


def _rounded(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()


def _step(body: StageBody, rows: int, length: int, device: torch.device) -> float:
    """Return the seconds of one step of decoding: the fastest of some, after one that warms up."""
    inputs: dict[str, Any] = {"input_ids": torch.zeros(rows, 1, dtype=torch.int64, device=device)}
    if "logits_to_keep" in inspect.signature(body.shard.forward).parameters:
        inputs["logits_to_keep"] = 1
    cache, name = cache_of(body.run(inputs | {"use_cache": True}).output), cache_name(body.shard.forward)
    if cache is not None and name is not None:
        if type(cache) is DynamicCache:
            cache = with_room(DynamicCache(config=body.shard.config.get_text_config(decoder=True)))
        inputs |= {name: cache, "use_cache": True}
    _seconds(body, inputs)
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, DynamicLayer) and layer.keys is not None and length > 1:
            layer.update(*(held.expand(-1, -1, length, -1) for held in _first(layer)))
    return min(_seconds(body, inputs) for _ in range(_STEPS))


def _first(layer: DynamicLayer) -> Iterator[torch.Tensor]:
    return (held[..., :1, :] for held in (layer.keys, layer.values) if held is not None)


def _seconds(body: StageBody, inputs: Mapping[str, Any]) -> float:
    began = time.perf_counter()
    body.run(inputs)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - began
