"""Where in its data a training is: the state of a data loader as plain data, in files and back.

A loader is anything with `state_dict()` and `load_state_dict()`: torchdata's StatefulDataLoader, an iterable
dataset of Hugging Face, a sampler of one's own; or what Megatron's trainers have, an iterator whose
`iterable` has `save_state()` and `restore_state()`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Final

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt.checkpoint.coordinator import together
from sharded_ckpt.checkpoint.local import LocalSource, user_path
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.checkpoint.source import read_json
from sharded_ckpt.runtime import as_runtime
from sharded_ckpt.training.checkpointing.layout import iteration_name
from sharded_ckpt.training.plain import from_plain, to_plain

logger = logging.getLogger(__name__)

_PATTERN: Final = "train_dataloader_dprank{:03d}.json"
_STATE: Final = "dataloader_state_dict"
_METHODS: Final = (("state_dict", "load_state_dict"), ("save_state", "restore_state"))


def dataloader_file(dp_rank: int) -> str:
    """Return the file, in the directory of an iteration, that has the state of one data-parallel rank.

    Example:
        >>> dataloader_file(0)
        'dataloader/train_dataloader_dprank000.json'
    """
    return f"dataloader/{_PATTERN.format(dp_rank)}"


def dataloader_state_of(train_iterator: Any) -> dict[str, Any] | None:
    """Return where a loader is, as plain data; None for None.

    Raises:
        ConfigError: The loader cannot say where it is, or says it in what cannot become JSON.
    """
    if train_iterator is None:
        return None
    loader, (save, _) = _loader_of(train_iterator)
    return {_STATE: to_plain(getattr(loader, save)(), f"the state of the {type(loader).__name__}")}


def load_dataloader_state(train_iterator: Any, plain: Any, where: str = "the state of a data loader") -> None:
    """Put a loader where `dataloader_state_of` found it.

    Args:
        train_iterator: The loader.
        plain: What `dataloader_state_of` gave.
        where: The file, for errors.

    Raises:
        CheckpointError: It is something else.
        ConfigError: The loader cannot be put anywhere.
    """
    if not isinstance(plain, dict) or _STATE not in plain:
        raise CheckpointError(f"{where}: not the state of a data loader: expected {_STATE}")
    loader, (_, load) = _loader_of(train_iterator)
    getattr(loader, load)(from_plain(plain[_STATE]))


def maybe_save_dataloader_state(
    model: Any,
    train_iterator: Any,
    iteration: int,
    dataloader_save_path: str | os.PathLike[str] | None = None,
    *,
    pg_collection: Any = None,
    runtime: Any = None,
) -> None:
    """Save where the loaders are, apart from other checkpoints; nothing happens without a loader or a path.

    Collective. The first rank of each pipeline writes, in `iter_…/` under the path; what was there for the
    iteration is replaced. `save_checkpoint` does not need this: it saves the state with the rest.

    Args:
        model: Accepted for those who call it so; not used.
        train_iterator: The loader of this rank.
        iteration: Steps taken.
        dataloader_save_path: Where to.
        pg_collection: Groups `dp`, `pp`, `tp`, `cp` of this rank, as far as there are any. By default all
            ranks are one pipeline, and rank 0 writes.
        runtime: Where we are. By default torch.distributed says, or this is the only process.

    Raises:
        ConfigError: The loader cannot say where it is.
        CollectiveError: In place of it on all ranks, when some of several failed.
    """
    if train_iterator is None or not dataloader_save_path:
        return
    where = as_runtime(runtime)
    writes = _is_first(pg_collection, where.global_rank)
    with together(where.control, "asking the data loaders where they are"):
        state = dataloader_state_of(train_iterator) if writes else None
    with transaction(Path(dataloader_save_path) / iteration_name(iteration), where.control) as save:
        save.supersede(_PATTERN.replace("{:03d}", "*"))
        if state is not None:
            save.write_json(_PATTERN.format(_data_parallel_rank(pg_collection)), state)


def maybe_load_dataloader_state(
    train_iterator: Any,
    iteration: int,
    dataloader_save_path: str | os.PathLike[str] | None = None,
    *,
    pg_collection: Any = None,
    runtime: Any = None,
) -> bool:
    """Put the loaders of all ranks where `maybe_save_dataloader_state` found them; collective.

    Returns:
        Whether there was anything for this iteration; if not, the loaders stay where they are, and that is
        logged.

    Raises:
        CheckpointError: There is, but not for this data-parallel rank.
        CollectiveError: In place of it on all ranks, when some of several failed.
    """
    if train_iterator is None or not dataloader_save_path:
        return False
    control = as_runtime(runtime).control
    directory = user_path(dataloader_save_path) / iteration_name(iteration)
    there = control.gather(directory.is_dir(), f"looking for data loaders in {directory}")
    if not any(there):
        logger.warning("%s: nothing was saved there: the data begins anew", directory)
        return False
    with together(control, f"loading data loaders from {directory}"):
        name = _PATTERN.format(_data_parallel_rank(pg_collection))
        if not (directory / name).exists():
            there_are = ", ".join(sorted(os.listdir(directory))[:8]) if directory.is_dir() else "nothing"
            raise CheckpointError(
                f"{directory / name} is not there, but {there_are}: saved with another number of "
                "data-parallel ranks? Go on with as many, or remove the directory to begin the data anew"
            )
        load_dataloader_state(train_iterator, read_json(LocalSource(directory), name), str(directory / name))
    return True


def _loader_of(train_iterator: Any) -> tuple[Any, tuple[str, str]]:
    """Return what knows where it is, and the names of its two methods."""
    for loader in (train_iterator, getattr(train_iterator, "iterable", None)):
        for methods in _METHODS:
            if all(callable(getattr(loader, name, None)) for name in methods):
                return loader, methods
    raise ConfigError(
        f"a {type(train_iterator).__name__} cannot say where in the data it is: it has neither state_dict() "
        "and load_state_dict(), nor an `iterable` with save_state() and restore_state(). Use a loader that "
        "has, such as torchdata's StatefulDataLoader, or pass none: the data would begin anew on a resume"
    )


def _is_first(groups: Any, global_rank: int) -> bool:
    """Whether this rank is the one of its data-parallel rank that writes."""
    known = [group for name in ("pp", "tp", "cp") if (group := getattr(groups, name, None)) is not None]
    return all(group.rank() == 0 for group in known) if known else groups is not None or global_rank == 0


def _data_parallel_rank(groups: Any) -> int:
    group = getattr(groups, "dp", None)
    return 0 if group is None else int(group.rank())
