"""Which checkpoint is loaded: decided from what directories list, on one rank, and told to all.

`list_checkpoints` looks at a directory, `resolve` decides (a pure function), `resolve_together` does both for
all ranks. Nothing is ever guessed: what was named and is not there is an error that says what is there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

from patchers.errors import CheckpointNotFoundError, ConfigError
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.training.checkpointing.config import CheckpointConfig
from sharded_ckpt.training.checkpointing.layout import (
    _DIRECT_ITERATION_DIR_SENTINEL,
    RELEASE,
    iteration_name,
)
from sharded_ckpt.training.checkpointing.listing import Listing, list_checkpoints
from sharded_ckpt.training.checkpointing.trackers import Tracker

logger = logging.getLogger(__name__)

Origin: TypeAlias = Literal["direct", "step", "tracker", "release", "non_persistent", "local", "pretrained"]

_NOTHING: Final = -1


@dataclass(frozen=True)
class Resolution:
    """The one checkpoint that is loaded.

    Attributes:
        directory: The directory of the step; or one of Hugging Face.
        iteration: The step; -1 where only the checkpoint itself can tell.
        origin: How it was come by.
        weights_only: Whether nothing else is taken from it, and training begins at step 0.
        older: Directories of earlier steps, latest first, for those who want one if this cannot be read.
    """

    directory: str
    iteration: int
    origin: Origin
    weights_only: bool = False
    older: tuple[str, ...] = ()


def resolve(
    config: CheckpointConfig,
    load: Listing | None = None,
    *,
    pretrained: Listing | None = None,
    non_persistent: Listing | None = None,
    local: int = _NOTHING,
) -> Resolution | None:
    """Decide what is loaded: the newest of what can be resumed, else what the training starts from.

    Args:
        config: What the training wants.
        load: What `config.load` holds.
        pretrained: What `config.pretrained_checkpoint` holds.
        non_persistent: What the directory of short-lived checkpoints that all ranks share holds.
        local: The newest step that every rank has a checkpoint of on its own disk; -1 if there is none.

    Returns:
        None if nothing was named, or if `load` is where this training saves and has not yet saved.

    Raises:
        CheckpointNotFoundError: What was named is not there.
        ConfigError: `load` is a checkpoint of Hugging Face, which nothing can be resumed from.

    Example:
        >>> config = CheckpointConfig(save="run", load="run")
        >>> resolve(config, Listing("run", True)) is None
        True
        >>> there = Listing("run", True, iterations=(10, 20), tracker=Tracker(20, False, "run/latest"))
        >>> resolve(config, there).directory
        'run/iter_0000020'
    """
    if load is not None and load.is_iteration:
        if config.ckpt_step is not None:
            logger.warning(
                "ckpt_step %d is left aside: %s is one step itself", config.ckpt_step, load.directory
            )
        return Resolution(load.directory, _NOTHING, "direct", config.finetune)
    if load is not None and config.ckpt_step is not None:
        _require_step(load, config.ckpt_step)
        return Resolution(load.path_of(config.ckpt_step), config.ckpt_step, "step", config.finetune)
    found: list[Resolution] = []
    if load is not None:
        found = _short_lived(config, non_persistent, local)
        found += _persistent(load, config, alone=not found)
    if found:
        newest = max(
            found, key=lambda one: one.iteration
        )  # of equal steps the first, which is the faster one
        for other in found:
            if other is not newest:
                logger.warning("%s is left aside: %s is of a later step", other.directory, newest.directory)
        return newest
    if pretrained is not None:
        return _pretrained(pretrained)
    return None


def resolve_together(
    config: CheckpointConfig, control: Coordinator, *, local: int = _NOTHING
) -> Resolution | None:
    """Look and decide on rank 0, and tell all ranks, who might see another state of the file system.

    Args:
        config: What the training wants; the same on all ranks.
        control: The ranks.
        local: As for `resolve`, the same on all ranks.

    Raises:
        CheckpointNotFoundError: As for `resolve`.
        CollectiveError: In its place on all of several ranks.
    """
    said: dict[str, Any] | None = None
    with together(control, "deciding which checkpoint is loaded"):
        if control.rank == 0:
            found = resolve(
                config,
                _listed(config.load, tracked=config.ckpt_step is None),
                pretrained=_listed(config.pretrained_checkpoint),
                non_persistent=_listed(config.non_persistent_directory),
                local=local,
            )
            said = None if found is None else asdict(found)
    told = control.gather(said, "telling which checkpoint is loaded")[0]
    return None if told is None else Resolution(**{**told, "older": tuple(told["older"])})


def _resolve_checkpoint_iteration(load_dir: str | None, ckpt_step_override: int | None) -> tuple[int, bool]:
    """Return which step of a directory is loaded, and whether it is a release.

    Args:
        load_dir: The directory of all checkpoints, or of one step.
        ckpt_step_override: The step that is wanted in place of the tracker's.

    Returns:
        The step: -2 for the directory itself, -1 if there is none, 0 for a release.

    Raises:
        CheckpointNotFoundError: There is no checkpoint of the step that is wanted.
        CheckpointError: The tracker is broken.

    Example:
        >>> _resolve_checkpoint_iteration(None, None)
        (-1, False)
    """
    if load_dir is None:
        return _NOTHING, False
    listing = list_checkpoints(load_dir, tracked=ckpt_step_override is None)
    if listing.is_iteration:
        return _DIRECT_ITERATION_DIR_SENTINEL, False
    if ckpt_step_override is not None:
        _require_step(listing, ckpt_step_override)
        return ckpt_step_override, False
    if listing.tracker is None:
        return _NOTHING, False
    return listing.tracker.iteration, listing.tracker.release


def _listed(directory: str | os.PathLike[str] | None, *, tracked: bool = True) -> Listing | None:
    return None if directory is None else list_checkpoints(directory, tracked=tracked)


def _require_step(load: Listing, step: int) -> None:
    if step not in load.iterations:
        raise CheckpointNotFoundError(
            f"ckpt_step is {step}, but {load.directory} has no checkpoint {iteration_name(step)}: {load}"
        )


def _short_lived(config: CheckpointConfig, listing: Listing | None, local: int) -> list[Resolution]:
    found = []
    if local >= 0:
        where = os.fspath(config.non_persistent_local_ckpt_dir or "")
        found.append(Resolution(where, local, "local", config.finetune))
    if listing is not None and listing.tracker is not None:
        step = _tracked(listing, listing.tracker)
        found.append(Resolution(listing.path_of(step), step, "non_persistent", config.finetune))
    return found


def _persistent(load: Listing, config: CheckpointConfig, *, alone: bool) -> list[Resolution]:
    """Return what the tracker of a directory names; nothing if no training has saved there yet."""
    if load.is_hf:
        raise ConfigError(
            f"load is {load.directory}, a checkpoint of Hugging Face: it has no step, no optimizer and no "
            "random numbers to resume. To start from its weights, name it as pretrained_checkpoint"
        )
    if load.tracker is not None:
        return [_named_by_tracker(load, load.tracker, config)]
    if load.iterations and not config.fall_back:
        raise CheckpointNotFoundError(
            f"{load.directory} has no tracker that says which checkpoint counts; {load}. Name one with "
            "ckpt_step, or take the newest with fall_back=True"
        )
    if load.iterations:
        newest = load.iterations[-1]
        logger.warning("%s has no tracker; the newest checkpoint is taken, step %d", load.directory, newest)
        return [Resolution(load.path_of(newest), newest, "tracker", config.finetune, _older(load, newest))]
    if load.is_unused and (config.resumes_itself or not alone) and not config.exit_on_missing_checkpoint:
        return []
    raise CheckpointNotFoundError(
        f"load is {load.directory}: {load}. A training that is to start fresh where nothing is there yet "
        "names the same directory as save and load, without exit_on_missing_checkpoint"
    )


def _named_by_tracker(load: Listing, tracker: Tracker, config: CheckpointConfig) -> Resolution:
    if tracker.release:
        if not load.has_release:
            raise CheckpointNotFoundError(
                f"{tracker.path} names a release, but there is no "
                f"{os.path.join(load.directory, RELEASE)}; {load}"
            )
        return Resolution(os.path.join(load.directory, RELEASE), 0, "release", True)
    if tracker.iteration not in load.iterations and config.fall_back:
        return _before(load, tracker, config)
    step = _tracked(load, tracker)
    return Resolution(load.path_of(step), step, "tracker", config.finetune, _older(load, step))


def _before(load: Listing, tracker: Tracker, config: CheckpointConfig) -> Resolution:
    """Return the newest checkpoint that is there in place of the one that the tracker names."""
    earlier = [step for step in load.iterations if step < tracker.iteration]
    if not earlier:
        _tracked(load, tracker)
    newest = earlier[-1]
    logger.warning(
        "%s names step %d, whose checkpoint is gone: falling back to step %d",
        tracker.path,
        tracker.iteration,
        newest,
    )
    return Resolution(load.path_of(newest), newest, "tracker", config.finetune, _older(load, newest))


def _tracked(listing: Listing, tracker: Tracker) -> int:
    if tracker.iteration not in listing.iterations:
        raise CheckpointNotFoundError(
            f"{tracker.path} names step {tracker.iteration}, but there is no "
            f"{listing.path_of(tracker.iteration)}; {listing}. Name one of them with ckpt_step, or take the "
            "newest before it with fall_back=True"
        )
    return tracker.iteration


def _older(load: Listing, step: int) -> tuple[str, ...]:
    return tuple(load.path_of(other) for other in reversed(load.iterations) if other < step)


def _pretrained(listing: Listing) -> Resolution:
    if listing.is_hf or listing.is_iteration:
        return Resolution(listing.directory, 0, "pretrained", True)
    if listing.tracker is None:
        raise CheckpointNotFoundError(
            f"pretrained_checkpoint is {listing.directory}: {listing}. Expected a checkpoint of Hugging "
            "Face, the directory of one step, or a directory with a tracker. Nothing was loaded: training "
            "does not start from random weights"
        )
    if listing.tracker.release and listing.has_release:
        return Resolution(os.path.join(listing.directory, RELEASE), 0, "pretrained", True)
    return Resolution(listing.path_of(_tracked(listing, listing.tracker)), 0, "pretrained", True)


def newest_of_all(steps: Sequence[Sequence[int]]) -> int:
    """Return the newest step that every rank has; -1 if there is none.

    Example:
        >>> newest_of_all([[10, 20], [10]]), newest_of_all([[10], []])
        (10, -1)
    """
    return max(set.intersection(*map(set, steps)), default=_NOTHING)
