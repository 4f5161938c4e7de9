"""How what is staged takes the place of a directory: the one step that others see.

A directory that does not exist yet appears by a rename. One that exists is exchanged with the stage in one
atomic step, after every file that the save does not replace has got a second name there. Where that cannot be
done, the names change one by one under a journal: shards come under names that no reader knows, small files
follow, and the index that makes it all current comes last.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Final, TypeAlias

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.arrangement import Arrangement, read_digests, sync_folders
from sharded_ckpt.checkpoint.contents import Contents
from sharded_ckpt.checkpoint.index import parse_index
from sharded_ckpt.checkpoint.journal import Journal, finish
from sharded_ckpt.checkpoint.local import Identity, identity_of
from sharded_ckpt.checkpoint.storage import UNSUPPORTED, LocalStorage
from sharded_ckpt.checkpoint.tree import is_mount_point, make_parents, remove_empty_parents, walk
from sharded_ckpt.checkpoint.workspace import Workspace, is_workspace

logger = logging.getLogger(__name__)

MAX_CARRIED: Final = 10_000
"""With more files than this that the save does not replace, a directory changes name by name."""

UNTOUCHED: Final = "nothing was published, what was there stays"
PUBLISHED: Final = "the new checkpoint is in place, whole"
PENDING: Final = (
    "the new checkpoint is complete, the next save into the directory or `recover` puts it in place"
)

_NO_LINKS = UNSUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK}

_Entries: TypeAlias = "Mapping[str, os.DirEntry[str]]"


class Publication:
    """One stage on its way to its place.

    Args:
        storage: The file system.
        workspace: Where the stage is.
        target: The directory that it becomes.
        contents: What the ranks say that they have staged.
        manifest: Whether to write a manifest.
        unique_names: Whether shards that replace others get names that no other save gives.
        in_use: Why the directory must not be exchanged, if the caller knows a reason.

    Attributes:
        state: What has become of the checkpoint so far, in words.
    """

    def __init__(
        self,
        storage: LocalStorage,
        workspace: Workspace,
        target: Path,
        contents: Contents,
        *,
        manifest: bool = False,
        unique_names: bool = False,
        in_use: str | None = None,
    ) -> None:
        self._storage, self._workspace, self._target = storage, workspace, target
        self._contents, self._manifest, self._in_use = contents, manifest, in_use
        self._unique_names = unique_names
        self.state = UNTOUCHED

    def publish(self) -> None:
        """Put the stage in its place.

        Raises:
            CheckpointError: What is staged is not what the ranks say, or does not fit what is there.
            OSError: The file system fails; `state` says what that means.
        """
        stage, pattern = self._workspace.stage, self._workspace.path / "owner"
        arrangement = Arrangement(self._storage, stage, self._contents, pattern)
        if not os.path.lexists(self._target):
            self._arrange(arrangement, {}, set())
            self._appear()
            return
        old = self._survey()
        ours = self._contents.replaces(old, self._listed)
        replaced = {name for name in ours if not (_is_private(name) or _is_mounted(old[name]))}
        reason = self._why_not_exchange(old, replaced)
        if reason is None:
            self._arrange(arrangement, old, replaced, self._token if self._unique_names else None)
            reason = self._exchange(old, replaced.union(arrangement.names))
        if reason is not None:
            logger.info("%s changes name by name: %s", self._target, reason)
            self._arrange(arrangement, old, replaced, self._token)
            _refuse_clashes(self._target, old.keys(), arrangement.names)  # old and new are there together
            self._change_names(old, replaced, arrangement.names)

    @property
    def _token(self) -> str:
        return self._workspace.owner.nonce

    # What is there

    def _survey(self) -> dict[str, os.DirEntry[str]]:
        """Return what the directory holds now, but for empty directories that the save fills."""
        inside, folders = self._workspace.inside, self._folders()

        def stays_out(name: str, entry: os.DirEntry[str]) -> bool:
            return (inside and is_workspace(name.split("/")[0])) or (name in folders and _is_empty(entry))

        entries = walk(self._storage, self._target)
        return {name: entry for name, entry in entries if not stays_out(name, entry)}

    def _folders(self) -> set[str]:
        """Return the directories, below the one that is saved to, that the save writes into."""
        names = {file.name for file in self._contents.files}.union(self._contents.indexes)
        names.update(name for name, _ in walk(self._storage, self._workspace.stage))
        return {str(parent) for name in names for parent in Path(name).parents}

    def _listed(self, index: str) -> list[str]:
        try:
            raw = self._storage.read(self._target / index)
            return list(parse_index(raw, location=str(self._target), file=index).files)
        except CheckpointError as error:
            logger.warning("the old index does not say which files it replaces: %s", error)
            return []

    def _why_not_exchange(self, old: _Entries, replaced: set[str]) -> str | None:
        if self._in_use:
            return self._in_use
        if self._workspace.inside:
            return "no directory can be made beside it"
        mine, theirs = os.stat(self._workspace.stage), os.stat(self._target)
        if (mine.st_uid, mine.st_gid) != (theirs.st_uid, theirs.st_gid):
            return "it belongs to somebody else"
        if private := next(filter(_is_private, old), None):
            return f"{private} belongs to another save"
        kept = [entry for name, entry in old.items() if name not in replaced]
        if len(kept) > MAX_CARRIED:
            return f"it holds {len(kept)} other files"
        if odd := next((entry.path for entry in kept if not _can_be_carried(entry)), None):
            return f"{odd} is neither a file nor a link"
        return next((f"{entry.path} is another disk" for entry in kept if _is_mounted(entry)), None)

    def _arrange(
        self, arrangement: Arrangement, old: _Entries, replaced: set[str], token: str | None = None
    ) -> None:
        arrangement.give_names(old, token)
        if self._manifest:
            arrangement.write_manifest(read_digests(self._storage, self._target, old.keys() - replaced))
        arrangement.sync()
        _refuse_clashes(self._target, old.keys() - replaced, arrangement.names)

    # The step itself

    def _appear(self) -> None:
        self._storage.rename(self._workspace.stage, self._target)
        self.state = PUBLISHED
        self._storage.sync_directory(self._target.parent)

    def _exchange(self, old: _Entries, ours: set[str]) -> str | None:
        """Exchange the directory with the stage; return why, if that is not possible."""
        stage, carried = self._workspace.stage, _Carried(self._storage, self._workspace.stage)
        reason = None
        try:
            for name, entry in old.items():
                if name not in ours:
                    carried.add(name, entry)
            carried.sync()
            self._storage.copy_mode(self._target, stage)
            self._storage.exchange(stage, self._target)
        except _CannotBeDoneError as error:
            reason = str(error)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            reason = f"its file system cannot exchange two names ({error.strerror})"
        if reason is not None:
            carried.drop()
            return reason
        self.state = PUBLISHED
        carried.add_late(ours, self._target)
        self._storage.sync_directory(self._target.parent)
        self._storage.sync_directory(self._workspace.path)
        return None

    def _change_names(self, old: _Entries, replaced: set[str], names: list[str]) -> None:
        indexes = self._contents.indexes
        fresh = [name for name in names if name not in old and name not in indexes]
        replacing = sorted(set(names) - set(fresh), key=lambda name: (name in indexes, name))
        gone = sorted(replaced - set(names))
        removed = {name: identity_of(old[name].stat(follow_symlinks=False)) for name in gone}
        todo = Journal(self._workspace.inside, self._target.name, fresh, replacing, removed)
        todo.write(self._storage, self._workspace.path)
        self.state = PENDING
        try:
            finish(self._storage, self._workspace.path)
        except OSError as error:
            logger.warning("publishing %s was interrupted, trying again: %s", self._target, error)
            finish(self._storage, self._workspace.path)
        self.state = PUBLISHED


class _CannotBeDoneError(Exception):
    """A directory cannot be exchanged, for a reason that shows only when it is tried."""


class _Carried:
    """The files that a save does not replace, which get a second name in the stage."""

    def __init__(self, storage: LocalStorage, stage: Path) -> None:
        self._storage, self._stage = storage, stage
        self._identities: dict[str, Identity] = {}

    def add(self, name: str, entry: os.DirEntry[str]) -> None:
        make_parents(self._storage, self._stage, name)
        path = self._stage / name
        try:
            status = entry.stat(follow_symlinks=False)
            if entry.is_symlink():
                self._storage.symlink(os.readlink(entry.path), path)
            elif entry.is_dir():
                self._storage.make_directory(path)
                self._storage.copy_mode(entry.path, path)
            else:
                self._storage.link(entry.path, path)
        except FileNotFoundError:
            if os.path.lexists(entry.path):
                raise
            return  # somebody has removed it just now
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise _CannotBeDoneError(f"{entry.path} cannot be linked ({error.strerror})") from None
        self._identities[name] = identity_of(status)

    def sync(self) -> None:
        sync_folders(self._storage, self._stage, self._identities)

    def drop(self) -> None:
        """Take everything out of the stage again."""
        for name in self._identities:
            path = self._stage / name
            if path.is_dir() and not path.is_symlink():
                self._storage.remove_directory(path)
            else:
                self._storage.unlink(path)
            remove_empty_parents(self._storage, self._stage, name)

    def add_late(self, ours: set[str], target: Path) -> None:
        """Bring over what others put into the old directory, now in the stage, while it was being carried."""
        for name, entry in list(walk(self._storage, self._stage)):
            status, path = entry.stat(follow_symlinks=False), target / name
            known = self._identities.get(name) == identity_of(status)
            if known or name in ours or entry.is_dir(follow_symlinks=False):
                continue
            if not (os.path.lexists(path) and os.path.samestat(os.lstat(path), status)):
                make_parents(self._storage, target, name)
                self._storage.rename(entry.path, path)


def _refuse_clashes(target: Path, kept: Set[str], names: list[str]) -> None:
    """Refuse to put a file where a directory stays, or the other way round."""
    old_folders = {str(parent) for name in kept for parent in Path(name).parents}
    new_folders = {str(parent) for name in names for parent in Path(name).parents}
    if clashes := sorted(old_folders.intersection(names) | new_folders.intersection(kept)):
        raise CheckpointError(
            f"{target}: {', '.join(clashes)} would have to be a file and a directory; "
            "move away what is there, or save elsewhere"
        )


def _is_private(name: str) -> bool:
    return any(map(is_workspace, name.split("/")))


def _is_empty(entry: os.DirEntry[str]) -> bool:
    """Return whether what `walk` gives is a directory: those with something in them, it enters."""
    return entry.is_dir(follow_symlinks=False) and not _is_mounted(entry)


def _is_mounted(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and is_mount_point(entry.path)


def _can_be_carried(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() or entry.is_file() or entry.is_dir()
