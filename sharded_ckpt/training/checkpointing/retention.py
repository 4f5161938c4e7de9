"""Which old checkpoints go, and how: never one that counts, is pinned, is being read or is being written."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from patchers.errors import CheckpointNotFoundError, ConfigError
from sharded_ckpt.checkpoint.storage import LocalStorage
from sharded_ckpt.checkpoint.tree import remove_tree, unlink_if_there, write_small
from sharded_ckpt.training.checkpointing.layout import iteration_name, iteration_of, names_in
from sharded_ckpt.training.checkpointing.listing import list_checkpoints

logger = logging.getLogger(__name__)

PIN_FILE: Final = "pinned"
"""A checkpoint with a file of this name in it stays, and is not replaced by another one of its step."""

_REMOVING: Final = ".removing"
_alone = threading.Lock()


def expired(
    iterations: Sequence[int], keep: int, *, newest: int | None = None, protected: Collection[int] = ()
) -> list[int]:
    """Return the steps whose checkpoints go, oldest first.

    Args:
        iterations: The steps that have whole checkpoints.
        keep: How many of the latest stay; -1 for all.
        newest: Steps after this one are of a future that was given up, or of one to come: they neither count
            nor go.
        protected: Steps that stay in any case. They count.

    Example:
        >>> expired([5, 10, 20, 100], 2, newest=20), expired([5, 10], 0, protected=[5])
        ([5], [10])
    """
    known = sorted(step for step in iterations if newest is None or step <= newest)
    if keep < 0:
        return []
    return [step for step in known[: max(0, len(known) - keep)] if step not in protected]


def remove_old_checkpoints(
    directory: str | os.PathLike[str],
    keep: int,
    *,
    newest: int | None = None,
    protected: Collection[int] = (),
    storage: LocalStorage | None = None,
) -> list[int]:
    """Remove the oldest checkpoints of a directory. What resists is left, and said in a warning.

    Args:
        directory: Of all checkpoints.
        keep: How many of the latest stay; -1 for all.
        newest: As for `expired`.
        protected: Steps that stay besides those that always do: what the tracker names, what is pinned, what
            is being read (by processes that share a file system on which `flock` works).
        storage: The file system.

    Returns:
        The steps that are gone.

    Raises:
        CheckpointError: The tracker is broken, so that nobody knows what counts; nothing was removed.
    """
    storage = storage or LocalStorage(durable=False)
    with _alone:
        _sweep(directory, storage)
        listing = list_checkpoints(directory)
        stay = set(protected)
        if listing.tracker is not None:
            stay.add(listing.tracker.iteration)
        going = expired(listing.iterations, keep, newest=newest, protected=stay)
        return [step for step in going if _remove(Path(listing.path_of(step)), storage)]


def cleanup_old_non_persistent_checkpoint(
    save_dir: str, leave_ckpt_num: int = 1, do_async: bool = False, *, max_iteration: int | None = None
) -> None:
    """Remove the oldest checkpoints of a directory, on rank 0; nothing on other ranks.

    What the tracker there names, what is pinned and what is being read stays, whatever the number.

    Args:
        save_dir: The directory of short-lived checkpoints.
        leave_ckpt_num: How many of the latest stay.
        do_async: Do it in a thread.
        max_iteration: Later steps neither count nor go.

    Raises:
        ConfigError: The number is negative.
        CheckpointError: The tracker is broken; nothing was removed. (In a thread it is a warning.)
    """
    if type(leave_ckpt_num) is not int or leave_ckpt_num < 0:
        raise ConfigError(f"leave_ckpt_num is {leave_ckpt_num!r}; it must be 0 or more")
    if not _is_first_rank():
        return
    if not do_async:
        remove_old_checkpoints(save_dir, leave_ckpt_num, newest=max_iteration)
        return

    def work() -> None:
        try:
            remove_old_checkpoints(save_dir, leave_ckpt_num, newest=max_iteration)
        except Exception as error:  # a thread has nobody to raise to
            logger.warning("old checkpoints in %s are not removed: %s", save_dir, error)

    threading.Thread(target=work, name="checkpoint-retention").start()


def pin_checkpoint(directory: str | os.PathLike[str]) -> None:
    """Keep the checkpoint of a step for good: neither retention nor a later save of the step removes it.

    Raises:
        CheckpointNotFoundError: There is no checkpoint.
    """
    path = Path(directory)
    if iteration_of(path.name) is None or not path.is_dir():
        raise CheckpointNotFoundError(
            f"{directory}: expected the directory of one step, such as {iteration_name(10)}"
        )
    if not is_pinned(path):
        write_small(LocalStorage(), path / PIN_FILE, b"")


def unpin_checkpoint(directory: str | os.PathLike[str]) -> None:
    """Let retention have a checkpoint again."""
    unlink_if_there(LocalStorage(), Path(directory) / PIN_FILE)


def is_pinned(directory: str | os.PathLike[str]) -> bool:
    """Return whether a checkpoint is pinned."""
    return os.path.lexists(Path(directory) / PIN_FILE)


@contextmanager
def being_read(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Keep retention from a checkpoint while it is read.

    Raises:
        CheckpointNotFoundError: There is no such directory.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFoundError(f"{directory}: no such directory") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointNotFoundError(f"{directory}: it is being removed just now") from None
        except OSError as error:  # some network file systems lock nothing
            logger.info("%s cannot be locked while it is read: %s", directory, error)
        yield
    finally:
        os.close(fd)


def _remove(path: Path, storage: LocalStorage) -> bool:
    """Take a checkpoint out of sight in one step, then remove it; return whether it is gone."""
    if is_pinned(path):
        return False
    gone = path.with_name(f".{path.name}{_REMOVING}")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not _can_lock(fd):
                logger.info("%s stays: it is being read", path)
                return False
            storage.rename(path, gone)
        finally:
            os.close(fd)
        remove_tree(storage, gone)
    except OSError as error:
        logger.warning("%s is old, but cannot be removed, the next save will try again: %s", path, error)
        return False
    return True


def _can_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # nothing is ever locked here
        return True
    return True


def _sweep(directory: str | os.PathLike[str], storage: LocalStorage) -> None:
    """Remove what an earlier removal has taken out of sight and not finished."""
    for name in names_in(directory):
        step = name.removeprefix(".").removesuffix(_REMOVING)
        if name == f".{step}{_REMOVING}" and iteration_of(step) is not None:
            try:
                remove_tree(storage, Path(directory) / name)
            except OSError as error:
                logger.warning("%s cannot be removed: %s", Path(directory) / name, error)


def _is_first_rank() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
