"""The child's way through the disk: made from its parent, saved from its ranks, reloaded on other numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharded_ckpt.checkpoint.index import INDEX_FILE
from sharded_ckpt.children import init_child_from_parent
from sharded_ckpt.loading import LoadReport, load_and_shard_model
from sharded_ckpt.saving import save_sharded_checkpoint

from .comparison import compare_with_files
from .pruning import Pruning
from .results import StepResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from patchers.descriptor import ModelDescriptor
    from sharded_ckpt.children import Scores
    from sharded_ckpt.runtime import Runtime


def make(
    parent: Path, pruning: Pruning, ffn_channels: Mapping[int, Scores], child: Path, runtime: Runtime
) -> StepResult:
    """Stream the checkpoint `child` out of its parent's, given scores of its channels; all ranks call it."""
    width = json.loads((parent / "config.json").read_text())["intermediate_size"]
    blocks = pruning.block_configs(width)
    options: dict[str, Any] = {"ffn_channels": ffn_channels, "durable": False, "progress": False}
    seconds = _timed(lambda: init_child_from_parent(parent, blocks, child, runtime=runtime, **options))
    return StepResult("made", runtime.world_size, _total_size(child), seconds)


def save(shard: PreTrainedModel, folder: Path, runtime: Runtime) -> StepResult:
    """Save the model that the ranks hold; all ranks call it."""
    seconds = _timed(lambda: save_sharded_checkpoint(shard, folder, runtime=runtime, durable=False))
    return StepResult("saved", runtime.world_size, _total_size(folder), seconds)


def reload(saved: Path, child: Path, descriptor: ModelDescriptor, runtime: Runtime) -> StepResult:
    """Load what was saved, and compare this rank's tensors with the child's own files; all ranks call it."""
    began = time.perf_counter()
    shard = load_and_shard_model(descriptor, saved, runtime=runtime, progress=False)
    seconds = time.perf_counter() - began
    found = compare_with_files(shard, child)
    report: LoadReport = shard.load_report  # type: ignore[assignment]
    return StepResult("reloaded", runtime.world_size, report.nbytes, seconds, found.equal, found.differing)


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _total_size(folder: Path) -> int:
    return int(json.loads((folder / INDEX_FILE).read_text())["metadata"]["total_size"])
