"""What ranks have added up: put together, and kept in files from which any number of ranks goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.coordinator import together
from sharded_ckpt.checkpoint.local import user_path
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.checkpoint.reader import open_checkpoint
from sharded_ckpt.checkpoint.source import open_source, read_json

if TYPE_CHECKING:
    from sharded_ckpt.pipeline.connected_stage import ConnectedStage

_FILE = "scores.json"
LOG_PROBS = "log_probs"
"""`"log_probs.<row>"` are those of a row; the number in any other name is that of a block."""


@dataclass(frozen=True)
class Progress:
    """How far a scoring has come.

    Attributes:
        batches: How many are done.
        digest: Of their content.
        sums: This rank's part of what was added up.
    """

    batches: int = 0
    digest: str = ""
    sums: Mapping[str, Tensor] = field(default_factory=dict)


def save_progress(stage: ConnectedStage, directory: str | os.PathLike[str], progress: Progress) -> None:
    """Save what all ranks have added up, whole or not at all."""
    with stage.collectively("scoring"):
        stage.conclude()
    with transaction(directory, stage.runtime.control, durable=False) as save:
        if progress.sums:
            save.write_tensors(dict(progress.sums))
        if stage.runtime.is_main_process:
            said = {"batches": progress.batches, "digest": progress.digest, **_model(stage)}
            save.write_json(_FILE, said)


def read_progress(stage: ConnectedStage, directory: str | os.PathLike[str]) -> Progress:
    """Read what this rank goes on from; nothing where nothing was saved.

    Raises:
        CheckpointError: Another model was scored there.
    """
    with together(stage.runtime.control, f"reading the scores in {os.fspath(directory)}"):
        if not (user_path(directory) / _FILE).exists():
            return Progress()
        said: dict[str, Any] = read_json(open_source(Path(directory)), _FILE)
        model = {name: said.get(name) for name in _model(stage)}
        if model != _model(stage):
            raise CheckpointError(
                f"{os.fspath(directory)} holds scores of {model}, not of {_model(stage)}; score into another "
                "directory, or remove it"
            )
        reader = open_checkpoint(Path(directory))
        sums = reader.read([key for key in reader.index if _is_mine(stage, key)], materialize=True)
        reader.close()
        return Progress(said["batches"], said["digest"], sums)


def united(stage: ConnectedStage, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, on every rank, the sums of all ranks."""
    links, head = stage.links, stage.lineup.head_rank
    if links is None:
        return dict(sums)
    shapes = {name: list(sums[name].shape) for name in sorted(sums)}
    held: list[dict[str, list[int]]] = stage.runtime.control.gather(shapes, "putting the scores together")
    names = [name for of_rank in held for name in of_rank]
    everything = dict(sums)
    if stage.runtime.global_rank != head:
        for name in shapes:
            links.forward.send(sums[name], head)
    else:
        for rank, of_rank in enumerate(held):
            for name, shape in of_rank.items() if rank != head else ():
                everything[name] = links.forward.ask(shape, torch.float64, rank).wait().cpu()
    links.settle()
    shared = [everything[name] for name in names] if stage.is_last else None
    return dict(zip(names, (tensor.cpu() for tensor in links.share(shared, len(names))), strict=True))


def _model(stage: ConnectedStage) -> dict[str, Any]:
    return {"model": stage.shard.config.name_or_path}


def _is_mine(stage: ConnectedStage, key: str) -> bool:
    """Whether this rank adds to a sum: that of a block with its owner, all others with the head."""
    kind, _, index = key.rpartition(".")
    return int(index) in stage.body.blocks if kind not in ("", LOG_PROBS) else stage.is_last
