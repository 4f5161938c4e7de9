"""The checkpoint of one step, opened to go on from: read and checked before anything is touched."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchers.errors import CheckpointError, CheckpointNotFoundError
from patchers.names import fold_indices
from sharded_ckpt.checkpoint.local import LocalSource
from sharded_ckpt.checkpoint.source import read_json
from sharded_ckpt.training.checkpointing.dataloader_state import dataloader_file
from sharded_ckpt.training.checkpointing.layout import (
    FORMAT,
    METADATA_FILE,
    TORCH_DIST,
    TRAIN_STATE_FILE,
    _get_checkpoint_format,
)
from sharded_ckpt.training.checkpointing.resolution import Resolution
from sharded_ckpt.training.checkpointing.retention import being_read
from sharded_ckpt.training.checkpointing.rng_state import check_rng_state, rng_file
from sharded_ckpt.training.checkpointing.small_files import VERSION
from sharded_ckpt.training.checkpointing.train_state import TrainState
from sharded_ckpt.training.state_reading import StoredState

if TYPE_CHECKING:
    from sharded_ckpt.runtime import Runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedCheckpoint:
    """The checkpoint of one step.

    Attributes:
        directory: Where it is.
        metadata: The content of metadata.json.
        train_state: How far the training had come.
        stored: Weights and optimizers.
        rng_state: The random numbers of this rank; None if there are none, or none are wanted, or, with a
            warning, if the number of ranks has changed.
    """

    directory: str
    metadata: Mapping[str, Any]
    train_state: TrainState
    stored: StoredState
    rng_state: Mapping[str, Any] | None

    @property
    def contents(self) -> Mapping[str, Any]:
        """Whether there are an optimizer, random numbers, and only an adapter."""
        contents: Mapping[str, Any] = self.metadata["contents"]
        return contents

    @classmethod
    def open(
        cls,
        directory: str,
        runtime: Runtime,
        *,
        local: bool = False,
        load_rng: bool = True,
        module_name: str | None = None,
    ) -> OpenedCheckpoint:
        """Open what `save_checkpoint` has written.

        Args:
            directory: The directory of the step.
            runtime: Which rank this is.
            local: Whether it is this rank's own.
            load_rng: Whether random numbers are wanted.
            module_name: Sets apart those of one of several models.

        Raises:
            CheckpointNotFoundError: Something is missing.
            CheckpointError: Something is broken, of another save, of another rank, or of a newer version.
        """
        source = LocalSource(directory)
        metadata = _metadata(source, directory)
        if local:
            _check_rank(metadata, runtime, directory)
        where = os.path.join(directory, TRAIN_STATE_FILE)
        train_state = TrainState.from_plain(read_json(source, TRAIN_STATE_FILE), where)
        stored = StoredState.open(directory)
        if stored.info["id"] != metadata["id"]:
            raise CheckpointError(
                f"{directory}: {METADATA_FILE} and training_state.json are of different saves; was something "
                "copied into it? Nothing was loaded"
            )
        for reader in (stored.model, stored.optim):
            reader.headers()  # says now which file is missing or cut off, while there is still a choice
        wanted = load_rng and metadata["contents"].get("rng")
        rng_state = _rng_state(source, metadata, runtime, module_name) if wanted else None
        return cls(directory, metadata, train_state, stored, rng_state)

    def loader_state(self, runtime: Runtime) -> Mapping[str, Any] | None:
        """Return where this rank's data loader was; None, with a warning, if nobody has said.

        Raises:
            CheckpointError: Every rank had a place of its own, and now there are more or fewer ranks.
        """
        source = LocalSource(self.directory)
        saved = [r for r in range(self.metadata["world_size"]) if source.exists(dataloader_file(r))]
        if not saved:
            logger.warning("%s was saved without a data loader: the data begins anew", self.directory)
            return None
        rank = 0 if saved == [0] else runtime.global_rank
        if rank not in saved or (saved != [0] and self.metadata["world_size"] != runtime.world_size):
            raise CheckpointError(
                f"{self.directory}: ranks {fold_indices(saved)} of {self.metadata['world_size']} were each "
                f"at a place of their own in the data; rank {runtime.global_rank} of {runtime.world_size} "
                "has none. Go on with as many ranks, or without train_data_iterator to begin the data anew"
            )
        state: Mapping[str, Any] = read_json(source, dataloader_file(rank))
        return state


@contextmanager
def opened(
    found: Resolution, runtime: Runtime, *, fall_back: bool = False, **options: Any
) -> Iterator[OpenedCheckpoint]:
    """Open a checkpoint on all ranks, or an older one. Retention leaves it alone until the end.

    Args:
        found: What was decided on.
        runtime: The ranks.
        fall_back: Whether an older one is taken.
        **options: What of it is wanted: see `OpenedCheckpoint.open`.

    Raises:
        CheckpointError: It cannot be read on some rank, nor can any older one.
        CollectiveError: In its place on all of several ranks.
    """
    with ExitStack() as reading:
        yield _first_that_opens(found, runtime, reading, fall_back, options)


def _first_that_opens(
    found: Resolution, runtime: Runtime, reading: ExitStack, fall_back: bool, options: Mapping[str, Any]
) -> OpenedCheckpoint:
    candidates = [found.directory, *(found.older if fall_back else ())]
    for number, directory in enumerate(candidates):
        one, error = None, None
        try:
            reading.enter_context(being_read(directory))
            one = OpenedCheckpoint.open(directory, runtime, local=found.origin == "local", **options)
        except (CheckpointError, OSError) as caught:
            error = caught
        said = runtime.control.gather(None if error is None else str(error), f"opening {directory}")
        if one is not None and not any(said):
            return one
        if number + 1 < len(candidates):
            why = next(filter(None, said))
            logger.warning("%s cannot be read, falling back to an older checkpoint: %s", directory, why)
            continue
        break
    runtime.control.vote(_hinted(error, found, fall_back), f"opening {directory}")
    raise CheckpointError(f"{directory} cannot be read on other ranks")


def _hinted(error: Exception | None, found: Resolution, fall_back: bool) -> Exception | None:
    if not isinstance(error, CheckpointError) or fall_back or not found.older:
        return error
    return type(error)(f"{error}. An older checkpoint is taken with fall_back=True")


def _rng_state(
    source: LocalSource, metadata: Mapping[str, Any], runtime: Runtime, module_name: str | None
) -> Mapping[str, Any] | None:
    same = runtime.world_size == metadata["world_size"]
    name = rng_file(runtime.global_rank if same else 0, module_name)
    state: Mapping[str, Any] = read_json(source, name)
    where = f"{source.location}/{name}"
    return state if check_rng_state(state, runtime.global_rank, runtime.world_size, where) else None


def _metadata(source: LocalSource, directory: str) -> dict[str, Any]:
    kind = _get_checkpoint_format(directory)
    if not source.exists(METADATA_FILE):
        raise CheckpointNotFoundError(
            f"{directory}: no {METADATA_FILE}, so nothing that a training can go on from; its weights alone "
            f"(it is in the form {kind!r}) can be had as pretrained_checkpoint"
        )
    where = os.path.join(directory, METADATA_FILE)
    said = read_json(source, METADATA_FILE)
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        other = " It seems to be Megatron's." if kind == TORCH_DIST else ""
        raise CheckpointError(
            f"{where}: not of a checkpoint of this library.{other} Weights alone can be had as "
            "pretrained_checkpoint, if they have the names of Hugging Face"
        )
    if type(said.get("version")) is not int or said["version"] > VERSION:
        raise CheckpointError(
            f"{where}: version {said.get('version')!r}, but only up to {VERSION} is known here: update"
        )
    wanted = {"id": str, "iteration": int, "world_size": int, "contents": dict, "sharded_backend": str}
    if odd := [name for name, kind in wanted.items() if not isinstance(said.get(name), kind)]:
        raise CheckpointError(f"{where}: has no usable {', '.join(odd)}")
    return said


def _check_rank(metadata: Mapping[str, Any], runtime: Runtime, directory: str) -> None:
    found = metadata.get("rank"), metadata["world_size"]
    if found != (runtime.global_rank, runtime.world_size):
        raise CheckpointError(
            f"{directory}: a local checkpoint of rank {found[0]} of {found[1]}, read on rank "
            f"{runtime.global_rank} of {runtime.world_size}: local checkpoints are for the same ranks only"
        )
