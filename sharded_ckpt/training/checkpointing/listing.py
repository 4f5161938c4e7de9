"""What a directory holds that training has saved to, as far as it matters for what is loaded from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from patchers.names import fold_indices
from sharded_ckpt.training.checkpointing.layout import (
    RELEASE,
    is_hf_directory,
    is_iteration_directory,
    iteration_name,
    iteration_of,
    names_in,
    shown,
)
from sharded_ckpt.training.checkpointing.trackers import Tracker, read_tracker


@dataclass(frozen=True)
class Listing:
    """What one directory holds.

    Attributes:
        directory: The directory.
        exists: Whether it is there.
        is_iteration: Whether it is itself the checkpoint of one step.
        is_hf: Whether it is a checkpoint of Hugging Face.
        iterations: The steps whose checkpoints it holds, ascending.
        has_release: Whether it holds weights that belong to no step.
        tracker: What its tracker says.
        names: Everything in it.
    """

    directory: str
    exists: bool = False
    is_iteration: bool = False
    is_hf: bool = False
    iterations: tuple[int, ...] = ()
    has_release: bool = False
    tracker: Tracker | None = None
    names: tuple[str, ...] = ()

    @property
    def is_unused(self) -> bool:
        """Whether no training has saved here yet."""
        return not (self.is_iteration or self.is_hf or self.iterations or self.has_release or self.tracker)

    def path_of(self, iteration: int) -> str:
        """Return the directory of a step."""
        return os.path.join(self.directory, iteration_name(iteration))

    def __str__(self) -> str:
        if not self.exists:
            return "there is no such directory"
        if self.iterations:
            return f"there are checkpoints of steps {fold_indices(self.iterations)}"
        return f"there is no checkpoint in it, found {shown(self.names)}"


def list_checkpoints(directory: str | os.PathLike[str], *, tracked: bool = True) -> Listing:
    """Look at a directory: names and tracker only, afresh every time.

    Args:
        directory: Of all checkpoints, or of one step.
        tracked: Whether the tracker is asked. Who knows which step is wanted need not mind a broken one.

    Raises:
        CheckpointError: The tracker is broken.
    """
    names = names_in(directory)
    where = os.fspath(directory)
    if is_iteration_directory(names):
        return Listing(where, True, is_iteration=True, names=tuple(names))
    steps = {step: name for name in names if (step := iteration_of(name)) is not None}
    whole = [step for step, name in steps.items() if is_iteration_directory(names_in(Path(where) / name))]
    return Listing(
        where,
        os.path.isdir(where),
        is_hf=is_hf_directory(names),
        iterations=tuple(sorted(whole)),
        has_release=is_iteration_directory(names_in(Path(where) / RELEASE)),
        tracker=read_tracker(where) if tracked else None,
        names=tuple(names),
    )
