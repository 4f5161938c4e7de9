"""The one way by which anything is saved: whole, or not at all.

All ranks stage their files in a private place; nobody else sees them. When all are through and well, rank 0
gives the shards their numbers, writes the indexes, and puts everything in the place of the directory in one
step (`commit`). Whatever fails before that, on any rank, leaves what was there untouched; who dies leaves
litter that the next save removes.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from patchers.errors import CheckpointError, CollectiveError
from patchers.names import fold_indices
from sharded_ckpt.checkpoint import workspace
from sharded_ckpt.checkpoint.commit import UNTOUCHED, Publication
from sharded_ckpt.checkpoint.contents import Contents, RankRecord
from sharded_ckpt.checkpoint.coordinator import Coordinator, Solo, refuse_disagreement
from sharded_ckpt.checkpoint.journal import STAGE
from sharded_ckpt.checkpoint.local import user_path
from sharded_ckpt.checkpoint.storage import LocalStorage, PathLike
from sharded_ckpt.checkpoint.transaction import Transaction
from sharded_ckpt.checkpoint.tree import make_parents, write_small
from sharded_ckpt.checkpoint.workspace import Workspace

__all__ = ["Transaction", "recover", "transaction"]

VISIBLE_WITHIN: Final = 5.0
"""Seconds in which what one rank made must be visible to the others; network file systems cache names."""


@contextmanager
def transaction(
    directory: PathLike,
    coordinator: Coordinator | None = None,
    *,
    durable: bool = True,
    manifest: bool = False,
    overwrite: bool = True,
    unique_names: bool = False,
    plan: Any = None,
    storage: LocalStorage | None = None,
) -> Iterator[Transaction]:
    """Save to a directory: all of what is written inside, or nothing, on all ranks alike.

    A directory that does not exist appears whole. In one that exists, files that the save neither writes nor
    supersedes stay. Readers see the old state or the new one; files that they have open or mapped stay valid.
    Work inside must not wait for other ranks: one that has failed would be waited for.

    Args:
        directory: Where to; `~` is the home directory. All ranks must see the same one.
        coordinator: The ranks that take part; a single process if not given.
        durable: Whether the checkpoint must survive a power cut once this returns.
        manifest: Whether to write `manifest.json`, with the size and SHA-256 of each file. If not, one that
            is there goes, as it would be wrong.
        overwrite: Whether the directory may hold something already.
        unique_names: Whether shards that replace others get names that no other save gives, such as
            `model-3f2a9c01-00001-of-00002.safetensors`. Our readers never need that. Others, who open one
            file after the other by name, may get some from before the save and some from after it where the
            names are the same; where they are not, they get an error then.
        plan: Plain data on which all ranks must agree before anything is written.
        storage: The file system; the local one if not given. It decides about `durable` then.

    Yields:
        Where this rank puts its files.

    Raises:
        CollectiveError: A rank failed; the same on all ranks. A single process raises the failure itself.
        ConfigError: The directory is a URL, or empty.
        CheckpointError: Another save into the directory is under way, or what the ranks wrote does not fit.
        OSError: The file system failed; the text says whether anything was published.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with transaction(f"{folder}/ckpt") as save:
        ...         save.write_tensors({"weight": torch.zeros(2, 3)})
        ...         save.write_json("config.json", {"model_type": "llama"})
        ...     sorted(os.listdir(f"{folder}/ckpt"))
        ['config.json', 'model-00001-of-00001.safetensors', 'model.safetensors.index.json']
    """
    coordinator = coordinator or Solo()
    storage = storage or LocalStorage(durable=durable)
    with _together(coordinator, f"preparing to save to {directory}"):
        target = Path(os.path.realpath(user_path(directory)))
    options = {"manifest": manifest, "overwrite": overwrite, "unique_names": unique_names}
    in_use = _agree(coordinator, target, {"durable": storage.durable, **options, "plan": plan})
    space: Workspace | None = None
    publication: Publication | None = None
    try:
        with _together(coordinator, f"preparing to save to {directory}"):
            if coordinator.rank == 0:
                space = _reserve(storage, target, overwrite=overwrite)
        path = _meet(coordinator, storage, target, space)
        with _together(coordinator, f"writing to {directory}"):
            save = Transaction(path / STAGE, coordinator.rank, storage, digest=manifest)
            yield save
            write_small(storage, path / _record_name(coordinator.rank), save.close().to_json(), sync=False)
        with _together(coordinator, f"publishing {directory}", lambda: _state_of(publication)):
            if space is not None:
                contents = Contents.merge(_read_records(storage, space.path, coordinator.world_size))
                publication = Publication(
                    storage,
                    space,
                    target,
                    contents,
                    manifest=manifest,
                    unique_names=unique_names,
                    in_use=in_use,
                )
                publication.publish()
    finally:
        if space is not None:
            workspace.release(storage, space)


def recover(directory: PathLike, *, storage: LocalStorage | None = None) -> None:
    """Finish what a save that died had begun to publish, and remove what it left; every save does so first.

    Raises:
        CheckpointError: A save into the directory is under way.
    """
    storage = storage or LocalStorage()
    workspace.release(storage, workspace.acquire(storage, Path(os.path.realpath(user_path(directory)))))


def _agree(coordinator: Coordinator, target: Path, options: dict[str, Any]) -> str | None:
    """Check that all ranks mean the same; return why the directory cannot be exchanged, if one knows why."""
    said = coordinator.gather(
        {"options": options, "inside": _works_in(target)}, f"agreeing on how to save to {target}"
    )
    refuse_disagreement([words["options"] for words in said], f"save to {target}")
    inside = [rank for rank, words in enumerate(said) if words["inside"]]
    return f"it is the working directory of rank {fold_indices(inside)}" if inside else None


def _works_in(target: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(target)
    except FileNotFoundError:  # somebody has removed it
        return False


def _reserve(storage: LocalStorage, target: Path, *, overwrite: bool) -> Workspace:
    if not target.name:
        raise CheckpointError(f"{target}: cannot save here: it is the root of the file system")
    if os.path.lexists(target) and not target.is_dir():
        raise CheckpointError(f"{target}: cannot save here: expected a directory, found a file")
    _refuse_write_protected(target)
    root = next(parent for parent in target.parents if os.path.lexists(parent))
    make_parents(storage, root, str(target.relative_to(root)))
    for parent in target.parents[1:]:
        if root != target.parent and parent.is_relative_to(root):
            storage.sync_directory(parent)
    space = workspace.acquire(storage, target)
    if not overwrite and target.is_dir() and [name for name in os.listdir(target) if name != space.path.name]:
        workspace.release(storage, space)
        raise CheckpointError(f"{target}: there is something already; save elsewhere, or with overwrite=True")
    return space


def _refuse_write_protected(target: Path) -> None:
    """Refuse now what only publishing would find out: then a stage of that mode could not even be removed."""
    effective = os.access in os.supports_effective_ids
    if target.is_dir() and not os.access(target, os.W_OK | os.X_OK, effective_ids=effective):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(target))


def _meet(coordinator: Coordinator, storage: LocalStorage, target: Path, space: Workspace | None) -> Path:
    """Return the workspace of rank 0 on every rank, after checking that all see the very same one."""
    mine = {"target": str(target), "owner": str(space.owner), "inside": space.inside} if space else None
    first = coordinator.gather(mine, f"meeting in {target}")[0]
    path = workspace.locate(target, inside=first["inside"])
    with _together(coordinator, f"meeting in {target}"):
        if space is None:
            _look_for(storage, path, first, target, coordinator.rank)
    return path


def _look_for(storage: LocalStorage, path: Path, first: dict[str, Any], target: Path, rank: int) -> None:
    """Wait until this rank sees the workspace of rank 0."""
    limit = time.monotonic() + (VISIBLE_WITHIN if str(target) == first["target"] else 0.0)
    while str(workspace.owner_of(storage, path)) != first["owner"]:
        if time.monotonic() > limit:
            theirs = workspace.locate(Path(first["target"]), inside=first["inside"])
            raise CheckpointError(
                f"{path}: rank {rank} does not see what rank 0 has made at {theirs}: "
                "all ranks must save to the same directory, on a file system that they share"
            )
        time.sleep(0.05)


def _record_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _read_records(storage: LocalStorage, path: Path, world_size: int) -> list[RankRecord]:
    return [RankRecord.from_json(storage.read(path / _record_name(rank))) for rank in range(world_size)]


@contextmanager
def _together(
    coordinator: Coordinator, doing: str, state: Callable[[], str] = lambda: UNTOUCHED
) -> Iterator[None]:
    """Run rank-local work, then vote, also after an interrupt: nobody must be waited for in vain."""
    error: BaseException | None = None
    try:
        yield
    except GeneratorExit:
        raise
    except BaseException as caught:
        error = _explain(caught, doing, state())
    try:
        coordinator.vote(error, doing)
    except CollectiveError:
        if error is None or isinstance(error, Exception):
            raise
        raise error from None  # an interrupt stays what it is


def _state_of(publication: Publication | None) -> str:
    return publication.state if publication else UNTOUCHED


def _explain(error: BaseException, doing: str, state: str) -> BaseException:
    """Say in an error of the system what it means for the checkpoint."""
    if type(error).__module__ != "builtins" or not isinstance(error, OSError) or error.errno is None:
        return error
    text = f"{error.strerror} while {doing}; {state}"
    told = OSError(error.errno, text, error.filename, None, error.filename2)
    told.__cause__ = error
    return told
