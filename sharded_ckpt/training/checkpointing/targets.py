"""Where one checkpoint goes."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt.training.checkpointing.config import CheckpointConfig
from sharded_ckpt.training.checkpointing.contexts import CheckpointType
from sharded_ckpt.training.checkpointing.layout import iteration_name
from sharded_ckpt.training.checkpointing.local import LocalCheckpointManager
from sharded_ckpt.training.checkpointing.retention import is_pinned


@dataclass(frozen=True)
class SaveTarget:
    """Where one checkpoint goes.

    Attributes:
        root: The directory of all checkpoints of its kind; the tracker is there. It is absolute: a save that
            goes on in the background must not depend on where the program works by then.
        iteration: The step.
        kind: Who reads it.
        keep: How many of its kind stay; -1 for all.
    """

    root: Path
    iteration: int
    kind: CheckpointType = CheckpointType.GLOBAL
    keep: int = -1

    @property
    def directory(self) -> str:
        """The directory of the step."""
        return os.fspath(self.root / iteration_name(self.iteration))

    @property
    def is_local(self) -> bool:
        """Whether it is on a disk of this rank alone."""
        return self.kind is CheckpointType.LOCAL

    @classmethod
    def of(
        cls,
        config: CheckpointConfig,
        iteration: int,
        *,
        non_persistent: bool = False,
        local: LocalCheckpointManager | None = None,
        rank: int = 0,
    ) -> SaveTarget:
        """Return where a checkpoint goes.

        Args:
            config: What the training wants.
            iteration: The step.
            non_persistent: Whether it is a short-lived one.
            local: Who knows of local checkpoints.
            rank: This rank.

        Raises:
            ConfigError: There is no place for it.
            CheckpointError: There is one of this step, and it is pinned.
        """
        if not non_persistent:
            if config.save is None:
                raise ConfigError("there is no place to save to: set save")
            target = cls(Path(config.save), iteration, keep=config.most_recent_k)
        elif local is not None:
            keep = config.non_persistent_recent_k
            target = cls(local.root(rank), iteration, CheckpointType.LOCAL, keep)
        elif config.non_persistent_directory is not None:
            target = cls(config.non_persistent_directory, iteration, keep=config.non_persistent_recent_k)
        else:
            raise ConfigError(
                f"non_persistent_ckpt_type is {config.non_persistent_ckpt_type!r}, so there is no place for "
                "a short-lived checkpoint: set it to global or local"
            )
        target = replace(target, root=Path(os.path.abspath(target.root)))
        if is_pinned(target.directory):
            raise CheckpointError(
                f"{target.directory} is pinned, and not replaced: unpin it, or save elsewhere"
            )
        return target
