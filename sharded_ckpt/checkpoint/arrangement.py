"""What is staged, made ready to be published: final names, indexes, manifest, everything on the disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.contents import Contents
from sharded_ckpt.checkpoint.manifest import MANIFEST_FILE, FileDigest, Manifest, digest_file, parse_manifest
from sharded_ckpt.checkpoint.shard_names import with_token
from sharded_ckpt.checkpoint.storage import LocalStorage
from sharded_ckpt.checkpoint.tree import make_parents, unlink_if_there, walk, write_small

logger = logging.getLogger(__name__)


class Arrangement:
    """The stage of one save, as it is given its final form by rank 0.

    Args:
        storage: The file system.
        stage: Where the ranks put their files.
        contents: What they say that they put there.
        pattern: A file that has the mode of the umask.

    Raises:
        CheckpointError: A rank put something elsewhere.
    """

    def __init__(self, storage: LocalStorage, stage: Path, contents: Contents, pattern: Path) -> None:
        self._storage, self._stage, self._contents = storage, stage, contents
        self._now = {file.name: file.staged for file in contents.files}  # the name of each in the stage
        self._derived: list[str] = []  # files that follow from the names of others
        self.names: list[str] = []
        """Everything in the stage that the save writes."""
        self._check(dict(walk(storage, stage)), pattern)

    def _check(self, found: Mapping[str, os.DirEntry[str]], pattern: Path) -> None:
        """Compare what is here with what ranks have written, and see to what others have put here."""
        ours = {file.staged: file.size for file in self._contents.files}
        for name, size in ours.items():
            seen = found[name].stat().st_size if name in found else "no such file"
            if seen != size:
                raise CheckpointError(
                    f"{self._stage / name}: a rank wrote {size} bytes, rank 0 finds {seen}: "
                    "all ranks must save to one shared file system"
                )
        for name, entry in found.items():
            if name not in ours and entry.is_file(follow_symlinks=False):
                if entry.stat().st_mode & 0o777 == 0o600:  # safetensors 0.8 gives 0600 whatever the umask
                    self._storage.copy_mode(pattern, entry.path)
                self._storage.sync_file(entry.path)

    def give_names(self, taken: Collection[str], token: str | None = None) -> None:
        """Rename the shards, and write the indexes that list them.

        Args:
            taken: The files of the old checkpoint.
            token: If given, files that are listed by an index that is taken, or whose names are, get it into
                their names, so that no reader can take them for the old ones.
        """
        for name in self._derived:
            unlink_if_there(self._storage, self._stage / name)
        self._derived = []
        for file in self._contents.files:
            clashes = file.index is not None and (file.index in taken or file.name in taken)
            self._rename(file.name, with_token(file.name, token) if token and clashes else file.name)
        for index in self._contents.indexes:
            self._write(index, self._contents.index_json(index, self._now))

    def write_manifest(self, before: Mapping[str, FileDigest]) -> None:
        """Write the manifest.

        Args:
            before: What the files are that stay.
        """
        files = dict(before)
        sums = {file.name: FileDigest(file.size, file.sha256) for file in self._contents.files if file.sha256}
        known = {self._now[name]: digest for name, digest in sums.items()}
        for name, entry in walk(self._storage, self._stage):
            if entry.is_file(follow_symlinks=False):
                files[name] = known.get(name) or digest_file(entry.path)
        self._write(MANIFEST_FILE, Manifest(files).to_json())

    def sync(self) -> None:
        """Wait until all names in the stage are on the disk."""
        self.names = [name for name, _ in walk(self._storage, self._stage)]
        sync_folders(self._storage, self._stage, self.names)

    def _rename(self, planned: str, name: str) -> None:
        current = self._now[planned]
        if current == name:
            return
        if os.path.lexists(self._stage / name):
            raise CheckpointError(f"{self._stage / name}: written twice, as a shard and by hand")
        make_parents(self._storage, self._stage, name)
        self._storage.rename(self._stage / current, self._stage / name)
        self._now[planned] = name

    def _write(self, name: str, data: bytes) -> None:
        if os.path.lexists(self._stage / name):
            raise CheckpointError(f"{self._stage / name}: written by hand, but it is the save that writes it")
        make_parents(self._storage, self._stage, name)
        self._derived.append(name)
        write_small(self._storage, self._stage / name, data)


def read_digests(storage: LocalStorage, directory: Path, kept: Collection[str]) -> dict[str, FileDigest]:
    """Return what the manifest of a directory says of files that stay there; nothing if it is of no use."""
    path = directory / MANIFEST_FILE
    try:
        before = parse_manifest(storage.read(path), str(path)).files
    except FileNotFoundError:
        return {}
    except CheckpointError as error:
        logger.warning("what the old manifest says is left out: %s", error)
        return {}
    return {name: digest for name, digest in before.items() if name in kept}


def sync_folders(storage: LocalStorage, root: Path, names: Collection[str]) -> None:
    """Wait until names in a directory and in those below it are on the disk."""
    folders = {root / parent for name in names for parent in Path(name).parents}
    for folder in sorted(folders | {root}, reverse=True):
        storage.sync_directory(folder)
