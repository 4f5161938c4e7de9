"""The small files that say which checkpoint counts: read with doubt, written last and atomically.

`latest_train_state.json` is a copy of the `train_state.json` of the newest checkpoint, and what this library
goes by. `latest_checkpointed_iteration.txt` says the same to Megatron's tools. Of Megatron-Bridge's own
`latest_train_state.pt` the step is read, without running what may be in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from patchers.errors import CheckpointError, CheckpointNotFoundError
from sharded_ckpt.checkpoint.storage import LocalStorage
from sharded_ckpt.checkpoint.strict_json import parse_json
from sharded_ckpt.checkpoint.tree import unlink_if_there, write_small
from sharded_ckpt.training.checkpointing.layout import RELEASE, TRACKER_PREFIX, TRAIN_STATE_FILE

TRAIN_STATE_TRACKER: Final = f"{TRACKER_PREFIX}_{TRAIN_STATE_FILE}"
BRIDGE_TRACKER: Final = f"{TRACKER_PREFIX}_train_state.pt"
ITERATION_TRACKER: Final = f"{TRACKER_PREFIX}_checkpointed_iteration.txt"

_MOST_BYTES: Final = 1 << 20
_WAY_OUT: Final = "Remove the file if it is not this training's, or pass ckpt_step"


@dataclass(frozen=True)
class Tracker:
    """What a tracker file says.

    Attributes:
        iteration: The step; 0 for a release.
        release: Whether it is weights that belong to no step.
        path: The file, for errors.
    """

    iteration: int
    release: bool
    path: str


def read_tracker(directory: str | os.PathLike[str]) -> Tracker | None:
    """Return what the tracker of a directory says, asking the file anew every time; None if there is none.

    Raises:
        CheckpointError: The tracker is broken: it is never taken for none.
    """
    for name, read in ((TRAIN_STATE_TRACKER, _step_in_json), (BRIDGE_TRACKER, _step_in_pickle)):
        path = Path(directory) / name
        if os.path.lexists(path):
            return Tracker(_checked(read(path), path), False, str(path))
    path = Path(directory) / ITERATION_TRACKER
    return Tracker(*read_metadata(str(path)), str(path)) if os.path.lexists(path) else None


def read_metadata(tracker_filename: str) -> tuple[int, bool]:
    """Return the step that Megatron's text tracker names, and whether it is a release.

    Args:
        tracker_filename: The file.

    Returns:
        The step, 0 for a release; and whether it is one.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: It holds neither a step nor the word `release`.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w") as file:
        ...     _ = file.write("20"), file.flush()
        ...     read_metadata(file.name)
        (20, False)
    """
    text = _read(Path(tracker_filename)).decode("utf-8", "replace").strip()
    if text == RELEASE:
        return 0, True
    if re.fullmatch(r"\d+", text, re.ASCII) is None:
        raise CheckpointError(
            f"{tracker_filename}: expected a step, or the word {RELEASE}; found {text[:80]!r}. "
            "Write the step of a checkpoint that is there into it, or pass ckpt_step"
        )
    return int(text), False


def write_trackers(
    directory: str | os.PathLike[str], train_state: Mapping[str, Any], storage: LocalStorage
) -> None:
    """Make a checkpoint, which must be in place, the one that counts.

    Args:
        directory: Of all checkpoints.
        train_state: The content of its `train_state.json`.
        storage: The file system.

    Raises:
        OSError: The file system failed; each tracker is the old one or the new one, whole.
    """
    told = json.dumps(train_state, indent=2).encode() + b"\n"
    held = storage.lock(directory)  # another process that saves here would write into what is renamed
    try:
        _write(Path(directory), told, str(train_state["step"]).encode(), storage)
    finally:
        if held is not None:
            storage.unlock(held)


def _write(directory: Path, train_state: bytes, iteration: bytes, storage: LocalStorage) -> None:
    for name, data in ((TRAIN_STATE_TRACKER, train_state), (ITERATION_TRACKER, iteration)):
        path = directory / name
        fresh = path.with_name(f".{name}.new")
        unlink_if_there(storage, fresh)  # of a process that died here
        write_small(storage, fresh, data)
        storage.rename(fresh, path)
    storage.sync_directory(directory)


def _step_in_json(path: Path) -> Any:
    data = _read(path)
    try:
        said = parse_json(data, str(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_WAY_OUT}") from None
    return said.get("step") if isinstance(said, dict) else None


def _step_in_pickle(path: Path) -> Any:
    import torch

    _read(path)
    try:
        said = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise anything
        raise CheckpointError(f"{path}: not read as plain tensors: {error}. {_WAY_OUT}") from error
    step = said.get("step") if isinstance(said, dict) else None
    return step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 else step


def _checked(step: Any, path: Path) -> int:
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{path}: expected a step, found {step!r:.80}. {_WAY_OUT}")
    return step


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{path}: no such tracker file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise CheckpointError(f"{path}: larger than any tracker file ({_MOST_BYTES} bytes)")
    return data
