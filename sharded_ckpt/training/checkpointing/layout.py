"""What a directory of training checkpoints looks like: names and markers. Nothing is loaded here.

    <save>/latest_train_state.json, latest_checkpointed_iteration.txt      which one counts (`trackers`)
    <save>/iter_0000010/metadata.json                                      what this one is
    <save>/iter_0000010/training_state.json, model/, optim/                weights and optimizers
    <save>/iter_0000010/train_state.json, run_config.json, rng/, …         all else, as JSON
    <save>/non_persistent/                                                 the same again, for the short-lived

The outer names are Megatron-Bridge's. What it pickles is JSON here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from patchers.errors import CheckpointNotFoundError
from sharded_ckpt.checkpoint.local import LocalSource
from sharded_ckpt.checkpoint.source import read_json

TRACKER_PREFIX: Final = "latest"
"""How the files begin that say which checkpoint counts."""

_NON_PERSISTENT_CKPT_SUBDIR: Final = "non_persistent"
_DIRECT_ITERATION_DIR_SENTINEL: Final = -2
"""Stands for "the directory itself" where an iteration is expected."""

RELEASE: Final = "release"
"""The directory, and the word in a tracker, of weights that belong to no step."""

METADATA_FILE: Final = "metadata.json"
TRAIN_STATE_FILE: Final = "train_state.json"
RUN_CONFIG_FILE: Final = "run_config.json"
FORMAT: Final = "sharded_ckpt training checkpoint"
SAFETENSORS, FSDP_DTENSOR, TORCH_DIST, HF = "safetensors", "fsdp_dtensor", "torch_dist", "hf"

_TRAINING_STATE: Final = "training_state.json"
_DCP_METADATA: Final = ".metadata"
_MARKERS: Final = frozenset(
    {
        METADATA_FILE,
        TRAIN_STATE_FILE,
        RUN_CONFIG_FILE,
        _TRAINING_STATE,
        _DCP_METADATA,
        "run_config.yaml",
        "train_state.pt",
    }
)
_HF_WEIGHTS: Final = re.compile(r"(model|pytorch_model).*\.(safetensors|bin)(\.index\.json)?")
_ITERATION: Final = re.compile(r"iter_(\d{7,})")


def iteration_name(iteration: int) -> str:
    """Return the name of the directory of a step.

    Example:
        >>> iteration_name(10)
        'iter_0000010'
    """
    return f"iter_{iteration:07d}"


def iteration_of(name: str) -> int | None:
    """Return the step whose directory has a name; None if it is no such name.

    Example:
        >>> iteration_of("iter_0000010"), iteration_of("iter_0000010.bak"), iteration_of("iter_10")
        (10, None, None)
    """
    match = _ITERATION.fullmatch(name)
    if match is None or iteration_name(int(match[1])) != name:
        return None
    return int(match[1])


def is_iteration_directory(names: Collection[str]) -> bool:
    """Return whether a directory with these names in it is the checkpoint of one step.

    Example:
        >>> is_iteration_directory(["train_state.pt"]), is_iteration_directory(["config.json"])
        (True, False)
    """
    return not _MARKERS.isdisjoint(names)


def is_hf_directory(names: Collection[str]) -> bool:
    """Return whether a directory with these names in it is a checkpoint of Hugging Face.

    Example:
        >>> is_hf_directory(["config.json", "model-00001-of-00002.safetensors"])
        True
    """
    weights = any(_HF_WEIGHTS.fullmatch(name) for name in names)
    return "config.json" in names and weights and not is_iteration_directory(names)


def names_in(directory: str | os.PathLike[str]) -> list[str]:
    """Return the names in a directory, sorted; nothing if it is none."""
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def shown(names: Collection[str]) -> str:
    """Return some names for an error: what there is where something else was looked for."""
    some = sorted(names)[:8]
    return ", ".join(some) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def _get_checkpoint_format(checkpoint_path: str) -> str:
    """Return in what form the checkpoint of one step is.

    Args:
        checkpoint_path: The directory of the step, or one of Hugging Face.

    Returns:
        `"safetensors"` (this library's), `"torch_dist"` (Megatron's), `"fsdp_dtensor"` (torch DCP) or `"hf"`.

    Raises:
        CheckpointNotFoundError: It is none of them; the text says what is there.
        CheckpointError: Its metadata.json is broken.
    """
    names = names_in(checkpoint_path)
    if METADATA_FILE in names:
        said = read_json(LocalSource(checkpoint_path), METADATA_FILE)
        backend = said.get("sharded_backend") if isinstance(said, dict) else None
        return backend if isinstance(backend, str) else TORCH_DIST
    if _TRAINING_STATE in names:
        return SAFETENSORS
    if _DCP_METADATA in names:
        return FSDP_DTENSOR
    if is_hf_directory(names):
        return HF
    raise CheckpointNotFoundError(
        f"{checkpoint_path}: no checkpoint of a known form: expected {METADATA_FILE}, {_TRAINING_STATE}, "
        f"{_DCP_METADATA}, or config.json with weights beside it; found {shown(names)}"
    )


def find_checkpoint_rank_0(checkpoints_path: str, iteration: int, release: bool = False) -> str | None:
    """Return the directory of the checkpoint of a step, if there is a whole one.

    Args:
        checkpoints_path: The directory of all of them.
        iteration: The step.
        release: Look for the weights that belong to no step.

    Example:
        >>> find_checkpoint_rank_0("nowhere", 10) is None
        True
    """
    directory = Path(checkpoints_path) / (RELEASE if release else iteration_name(iteration))
    return str(directory) if is_iteration_directory(names_in(directory)) else None
