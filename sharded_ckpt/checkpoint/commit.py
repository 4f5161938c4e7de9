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
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.contents import Contents, with_token
from sharded_ckpt.checkpoint.index import parse_index
from sharded_ckpt.checkpoint.journal import Journal, finish
from sharded_ckpt.checkpoint.local import Identity, identity_of
from sharded_ckpt.checkpoint.manifest import MANIFEST_FILE, FileDigest, Manifest, digest_file, parse_manifest
from sharded_ckpt.checkpoint.storage import UNSUPPORTED, LocalStorage
from sharded_ckpt.checkpoint.tree import (
    copy_file,
    is_mount_point,
    make_parents,
    unlink_if_there,
    walk,
    write_small,
)
from sharded_ckpt.checkpoint.workspace import Workspace, is_workspace

logger = logging.getLogger(__name__)

MAX_CARRIED: Final = 10_000
"""With more files than this that the save does not replace, a directory changes name by name."""

_NO_LINKS = UNSUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK}


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
        published: Whether others see, or will see, the new checkpoint, whatever fails from now on.
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
        self._stage = workspace.stage
        self._contents, self._manifest, self._in_use = contents, manifest, in_use
        self._token = workspace.owner.nonce if unique_names else None
        self._renamed: dict[str, str] = {}  # files whose name in the stage is not the planned one
        self._written: list[str] = []  # indexes and manifest, which follow from the names
        self._carried: dict[
            str, Identity
        ] = {}  # what the save does not replace, as it was when it was linked
        self.published = False

    def publish(self) -> None:
        """Put the stage in its place.

        Raises:
            CheckpointError: What is staged is not what the ranks say.
            OSError: The file system fails; unless `published`, nothing has changed for others.
        """
        self._check_stage()
        self._renamed = {file.name: file.staged for file in self._contents.files}
        if not os.path.lexists(self._target):
            self._settle({})
            self._appear()
            return
        old = self._survey()
        replaced = {name for name in self._contents.replaces(old, self._listed) if not _is_private(name)}
        reason = self._why_not_exchange(old, replaced)
        if reason is None:
            staged = self._settle(old, self._token)
            reason = self._exchange(old, replaced, staged)
        if reason is not None:
            logger.info("%s changes name by name: %s", self._target, reason)
            self._change_names(old, replaced)

    # What is there

    def _check_stage(self) -> None:
        """Check that what other ranks have written is here, and see to files that came by other hands."""
        staged = dict(walk(self._storage, self._stage))
        ours = {file.staged: file.size for file in self._contents.files}
        for name, size in ours.items():
            found = staged[name].stat().st_size if name in staged else None
            if found != size:
                seen = "no such file" if found is None else str(found)
                raise CheckpointError(
                    f"{self._stage / name}: a rank wrote {size} bytes, rank 0 finds {seen}: "
                    "all ranks must save to one shared file system"
                )
        for name, entry in staged.items():
            if name not in ours and entry.is_file(follow_symlinks=False):
                if entry.stat().st_mode & 0o077 == 0:  # safetensors 0.8 gives 0600 whatever the umask
                    self._storage.copy_mode(self._workspace.path / "owner", entry.path)
                self._storage.sync_file(entry.path)

    def _survey(self) -> dict[str, os.DirEntry[str]]:
        """Return what the directory holds now."""
        entries = walk(self._storage, self._target)
        inside = self._workspace.inside
        return {name: entry for name, entry in entries if not (inside and is_workspace(name.split("/")[0]))}

    def _listed(self, index: str) -> list[str]:
        try:
            raw = self._storage.read(self._target / index)
            return list(parse_index(raw, location=str(self._target), file=index).files)
        except CheckpointError as error:
            logger.warning("the old index does not say which files it replaces: %s", error)
            return []

    def _why_not_exchange(self, old: Mapping[str, os.DirEntry[str]], replaced: set[str]) -> str | None:
        if self._in_use:
            return self._in_use
        if self._workspace.inside:
            return "no directory can be made beside it"
        mine, theirs = os.stat(self._stage), os.stat(self._target)
        if (mine.st_uid, mine.st_gid) != (theirs.st_uid, theirs.st_gid):
            return "it belongs to somebody else"
        kept = [entry for name, entry in old.items() if name not in replaced]
        if len(kept) > MAX_CARRIED:
            return f"it holds {len(kept)} other files"
        if private := next(filter(_is_private, old), None):
            return f"{private} belongs to another save"
        for entry in kept:
            if not _can_be_carried(entry):
                return f"{entry.path} is neither a file nor a link, or another file system"
        return None

    # What is staged

    def _settle(self, old: Mapping[str, object], token: str | None = None) -> list[str]:
        """Give everything in the stage its final name, write indexes and manifest; return all names."""
        for name in self._written:
            unlink_if_there(self._storage, self._stage / name)
        self._written = []
        for file in self._contents.files:
            fresh = token is not None and file.index is not None and (file.index in old or file.name in old)
            self._rename(file.name, with_token(file.name, token or "") if fresh else file.name)
        for index in self._contents.indexes:
            self._write(index, self._contents.index_json(index, self._renamed))
        if self._manifest:
            self._write(MANIFEST_FILE, self._make_manifest(old).to_json())
        names = [name for name, _ in self._staged()]
        self._sync_stage(names)
        return names

    def _staged(self) -> list[tuple[str, os.DirEntry[str]]]:
        return [item for item in walk(self._storage, self._stage) if item[0] not in self._carried]

    def _rename(self, planned: str, name: str) -> None:
        current = self._renamed.get(planned, planned)
        if current == name:
            return
        if os.path.lexists(self._stage / name):
            raise CheckpointError(f"{self._stage / name}: written twice, as a shard and by hand")
        make_parents(self._storage, self._stage, name)
        self._storage.rename(self._stage / current, self._stage / name)
        self._renamed[planned] = name

    def _write(self, name: str, data: bytes) -> None:
        make_parents(self._storage, self._stage, name)
        self._written.append(name)
        write_small(self._storage, self._stage / name, data)

    def _make_manifest(self, old: Mapping[str, object]) -> Manifest:
        known = {
            self._renamed.get(file.name, file.name): FileDigest(file.size, file.sha256)
            for file in self._contents.files
            if file.sha256
        }
        files: dict[str, FileDigest] = {}
        if MANIFEST_FILE in old:
            try:
                path = self._target / MANIFEST_FILE
                before = parse_manifest(self._storage.read(path), str(path)).files
                gone = self._contents.replaces(old, self._listed)
                files.update(
                    {name: said for name, said in before.items() if name in old and name not in gone}
                )
            except CheckpointError as error:
                logger.warning("the old manifest is left out: %s", error)
        for name, entry in self._staged():
            if entry.is_file(follow_symlinks=False):
                files[name] = known.get(name) or digest_file(entry.path)
        return Manifest(files)

    def _sync_stage(self, names: list[str]) -> None:
        folders = {self._stage / parent for name in names for parent in Path(name).parents}
        for folder in sorted(folders | {self._stage}, reverse=True):
            self._storage.sync_directory(folder)

    # The step itself

    def _appear(self) -> None:
        self._storage.rename(self._stage, self._target)
        self.published = True
        self._storage.sync_directory(self._target.parent)

    def _exchange(
        self, old: Mapping[str, os.DirEntry[str]], replaced: set[str], staged: list[str]
    ) -> str | None:
        """Exchange the directory with the stage; return why, if that is not possible."""
        ours = replaced.union(staged)
        for name, entry in old.items():
            if name not in ours:
                self._carried[name] = self._carry(name, entry)
        self._sync_stage([*staged, *self._carried])
        self._storage.copy_mode(self._target, self._stage)
        try:
            self._storage.exchange(self._stage, self._target)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return f"its file system cannot exchange two names ({error.strerror})"
        self.published = True
        self._carry_late(ours)
        self._storage.sync_directory(self._target.parent)
        self._storage.sync_directory(self._workspace.path)
        return None

    def _carry(self, name: str, entry: os.DirEntry[str]) -> Identity:
        """Give a file that the save does not replace a place in the new directory."""
        make_parents(self._storage, self._stage, name)
        status, path = entry.stat(follow_symlinks=False), self._stage / name
        if entry.is_symlink():
            self._storage.symlink(os.readlink(entry.path), path)
        elif entry.is_dir():
            self._storage.make_directory(path)
            self._storage.copy_mode(entry.path, path)
        else:
            try:
                self._storage.link(entry.path, path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                copy_file(self._storage, entry.path, path)
        return identity_of(status)

    def _carry_late(self, ours: set[str]) -> None:
        """Bring over what others put into the old directory while it was being carried."""
        for name, entry in list(walk(self._storage, self._stage)):  # which holds the old directory now
            path = self._target / name
            status = entry.stat(follow_symlinks=False)
            known = self._carried.get(name) == identity_of(status)
            if known or name in ours or entry.is_dir(follow_symlinks=False):
                continue
            if not (os.path.lexists(path) and os.path.samestat(os.lstat(path), status)):
                make_parents(self._storage, self._target, name)
                self._storage.rename(entry.path, path)

    def _change_names(self, old: Mapping[str, os.DirEntry[str]], replaced: set[str]) -> None:
        names = self._settle(old, token=self._workspace.owner.nonce)
        fresh = [name for name in names if name not in old and name not in self._contents.indexes]
        replacing = sorted(set(names) - set(fresh), key=lambda name: (name in self._contents.indexes, name))
        removed = {
            name: identity_of(old[name].stat(follow_symlinks=False)) for name in sorted(replaced - set(names))
        }
        todo = Journal(self._workspace.inside, self._target.name, fresh, replacing, removed)
        todo.write(self._storage, self._workspace.path)
        self.published = True
        try:
            finish(self._storage, self._workspace.path)
        except OSError as error:
            logger.warning("publishing %s was interrupted, trying again: %s", self._target, error)
            finish(self._storage, self._workspace.path)


def _is_private(name: str) -> bool:
    return any(map(is_workspace, name.split("/")))


def _can_be_carried(entry: os.DirEntry[str]) -> bool:
    if entry.is_dir(follow_symlinks=False) and is_mount_point(entry.path):
        return False
    return entry.is_symlink() or entry.is_file() or entry.is_dir()
