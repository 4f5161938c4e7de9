"""Directories that look like those of a training, as far as names and trackers go."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def run_directory(root: Path, steps: Iterable[int] = (), tracker: int | str | None = None) -> Path:
    """Make a directory with whole checkpoints of some steps, and with a text tracker."""
    root.mkdir(parents=True, exist_ok=True)
    for step in steps:
        directory = root / f"iter_{step:07d}"
        directory.mkdir()
        (directory / "metadata.json").write_text("{}")
    if tracker is not None:
        (root / "latest_checkpointed_iteration.txt").write_text(str(tracker))
    return root


def steps_in(root: Path) -> list[int]:
    """The steps whose directories are there."""
    return sorted(int(path.name.removeprefix("iter_")) for path in root.glob("iter_*"))


def track(root: Path, step: object) -> None:
    """Write the tracker of this library."""
    (root / "latest_train_state.json").write_text(json.dumps({"step": step}))


def hf_directory(root: Path) -> Path:
    """Make a directory with the names of a checkpoint of Hugging Face."""
    root.mkdir()
    (root / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(b"")
    return root
