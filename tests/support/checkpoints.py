"""Small checkpoints whose every tensor says which save it is of, and what a stranger reads of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sharded_ckpt.checkpoint.publish import Transaction, recover, transaction
from sharded_ckpt.checkpoint.storage import LocalStorage
from sharded_ckpt.checkpoint.workspace import unfinished

NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)] + ["model.norm.weight", "lm_head.weight"]


def values(version: int) -> dict[str, torch.Tensor]:
    """The tensors of one version: equal shapes, different values."""
    tensors = {name: torch.full((8, 8), version + i / 8) for i, name in enumerate(NAMES)}
    return {**tensors, "scale": torch.tensor(float(version)), "none": torch.zeros(0, 4)}


def fill(save: Transaction, version: int, rank: int = 0, world_size: int = 1) -> None:
    """Stage what one rank saves of a version."""
    mine = dict(list(values(version).items())[rank::world_size])
    save.write_tensors(mine, max_shard_size=600)
    if rank == 0:
        save.write_json("config.json", {"version": version})


def save_version(directory: Any, version: int, **options: Any) -> None:
    """Save a version from one process."""
    with transaction(directory, **options) as save:
        fill(save, version)


def stranger_reads(directory: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint by its index, with `safetensors` and nothing of ours."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(directory / file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


def version_in(directory: Path) -> int | None:
    """The version that a directory holds, whole and bit by bit; None if there is no checkpoint."""
    if not (directory / "model.safetensors.index.json").exists():
        assert not list(directory.glob("model*.safetensors")), os.listdir(directory)
        return None
    found = stranger_reads(directory)
    version = int(found["scale"])
    wanted = values(version)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert json.loads((directory / "config.json").read_text()) == {"version": version}
    return version


def recovered_version(directory: Path) -> int | None:
    """The version that a directory holds once what an interrupted save had begun to publish is finished."""
    if unfinished(directory):
        recover(directory, storage=LocalStorage(durable=False))
        assert not unfinished(directory)
    return version_in(directory)


def files_in(directory: Path) -> list[str]:
    """All files below a directory, by their names from there."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())
