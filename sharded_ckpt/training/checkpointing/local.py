"""Short-lived checkpoints on a disk of each rank: fast to write, and read by the same ranks only.

<directory>/rank_00000/iter_0000010/      what rank 0 has, all of it, in the files of any other checkpoint
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from patchers.errors import ConfigError
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.runtime import default_runtime
from sharded_ckpt.training.checkpointing.config import CheckpointConfig
from sharded_ckpt.training.checkpointing.layout import iteration_name
from sharded_ckpt.training.checkpointing.listing import list_checkpoints
from sharded_ckpt.training.checkpointing.resolution import newest_of_all

LOCAL_MANAGER: Final = "local_checkpoint_manager"
"""Where a checkpointing context has it."""


class LocalCheckpointManager:
    """Where each rank has checkpoints of its own.

    Args:
        directory: The same path on all ranks; what lies there may be another disk on each.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def root(self, rank: int) -> Path:
        """Return the directory of all checkpoints of a rank."""
        return self.directory / f"rank_{rank:05d}"

    def path_of(self, iteration: int, rank: int) -> Path:
        """Return the directory of one checkpoint of a rank."""
        return self.root(rank) / iteration_name(iteration)

    def find_latest(self, control: Coordinator) -> int:
        """Return the newest step that all ranks have a checkpoint of; -1 if there is none. Collective."""
        steps: tuple[int, ...] = ()
        with together(control, f"looking for local checkpoints in {self.directory}"):
            steps = list_checkpoints(self.root(control.rank)).iterations
        said = control.gather(list(steps), f"comparing the local checkpoints in {self.directory}")
        return newest_of_all(said)


def init_checkpointing_context(checkpoint_config: CheckpointConfig) -> dict[str, Any]:
    """Return what saves and loads keep from one to the next: who knows of local checkpoints.

    Args:
        checkpoint_config: What the training wants.

    Example:
        >>> init_checkpointing_context(CheckpointConfig(save="run"))
        {}
    """
    if checkpoint_config.non_persistent_ckpt_type != "local":
        return {}
    directory = checkpoint_config.non_persistent_local_ckpt_dir
    return {} if directory is None else {LOCAL_MANAGER: LocalCheckpointManager(directory)}


def local_manager_of(
    config: CheckpointConfig, context: dict[str, Any] | None
) -> LocalCheckpointManager | None:
    """Return who knows of local checkpoints: that of the context, else a new one; None if there are none."""
    known = {**init_checkpointing_context(config), **(context or {})}
    manager: LocalCheckpointManager | None = known.get(LOCAL_MANAGER)
    return manager


def _get_non_persistent_iteration(
    non_persistent_global_dir: str,
    non_persistent_ckpt_type: str | None = None,
    checkpointing_context: Mapping[str, Any] | None = None,
) -> int:
    """Return the step of the newest short-lived checkpoint; -1 if there is none.

    Args:
        non_persistent_global_dir: Where those are that all ranks share.
        non_persistent_ckpt_type: `"global"`, `"local"`, or None for none at all.
        checkpointing_context: What `init_checkpointing_context` gave, for local ones.

    Raises:
        ConfigError: There is no such type.

    Example:
        >>> _get_non_persistent_iteration("nowhere", "global"), _get_non_persistent_iteration("nowhere")
        (-1, -1)
    """
    if non_persistent_ckpt_type is None:
        return -1
    if non_persistent_ckpt_type == "global":
        tracker = list_checkpoints(non_persistent_global_dir).tracker
        return -1 if tracker is None else tracker.iteration
    if non_persistent_ckpt_type != "local":
        raise ConfigError(
            f"non_persistent_ckpt_type is {non_persistent_ckpt_type!r}; it must be global or local"
        )
    manager = (checkpointing_context or {}).get(LOCAL_MANAGER)
    return -1 if manager is None else int(manager.find_latest(default_runtime().control))
