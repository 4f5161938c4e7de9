"""What is left to do when several names in one directory change together, written down beforehand.

A directory that cannot be exchanged as a whole changes name by name. The list of changes is on the disk
before any of them is made, and making them twice does no harm, so that whoever finds it can finish.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.local import Identity, identity_of
from sharded_ckpt.checkpoint.source import check_name
from sharded_ckpt.checkpoint.storage import LocalStorage
from sharded_ckpt.checkpoint.tree import (
    make_parents,
    remove_empty_parents,
    unlink_if_there,
    write_small,
)

JOURNAL: Final = "commit.json"
STAGE: Final = "new"


@dataclass(frozen=True)
class Journal:
    """Changes to a directory, in the order in which they are made."""

    inside: bool
    """Whether the workspace lies in the directory that changes; else it lies beside it."""
    name: str
    """The name of the directory that changes."""
    fresh: list[str]
    """Staged files whose names nobody knows yet."""
    replacing: list[str]
    """Staged files that others may read already under the same name; indexes come last."""
    removed: dict[str, Identity]
    """Names in the directory that go, unless something else has them by then."""

    def write(self, storage: LocalStorage, workspace: Path) -> None:
        """Put the journal in its place: from here on the changes will be made, by `finish`."""
        draft = workspace / f"{JOURNAL}.draft"
        write_small(storage, draft, json.dumps(asdict(self)).encode())
        storage.rename(draft, workspace / JOURNAL)

    @classmethod
    def read(cls, storage: LocalStorage, workspace: Path) -> Journal | None:
        """Return the journal of a workspace, or None if there is none.

        Raises:
            CheckpointError: It is damaged; nothing is guessed.
        """
        path = workspace / JOURNAL
        try:
            journal = cls(**json.loads(storage.read(path)))
            for name in (*journal.fresh, *journal.replacing, *journal.removed):
                check_name(name, str(path))
            if journal.name in ("", ".", "..") or "/" in journal.name:
                raise ValueError(f"unsafe directory name {journal.name!r}")
        except FileNotFoundError:
            return None
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: not the journal of an interrupted save: {error}") from None
        return journal


def finish(storage: LocalStorage, workspace: Path) -> None:
    """Make the changes that a journal in a workspace lists, those that are left; none without a journal."""
    journal = Journal.read(storage, workspace)
    if journal is None:
        return
    storage.sync_directory(workspace)
    target = workspace.parent if journal.inside else workspace.parent / journal.name
    for names in (journal.fresh, journal.replacing):
        for name in names:
            if os.path.lexists(workspace / STAGE / name):
                make_parents(storage, target, name)
                storage.rename(workspace / STAGE / name, target / name)
        for folder in sorted({(target / name).parent for name in names} | {target}):
            storage.sync_directory(folder)
    for name, identity in journal.removed.items():
        _remove(storage, target, name, identity)
    storage.sync_directory(target)
    storage.unlink(workspace / JOURNAL)


def _remove(storage: LocalStorage, target: Path, name: str, identity: Identity) -> None:
    path = target / name
    if path.is_dir() and not path.is_symlink():  # an empty one, unless somebody has put something there since
        name = f"{name}/."
    elif os.path.lexists(path) and identity_of(os.lstat(path)) == tuple(identity):
        unlink_if_there(storage, path)
    remove_empty_parents(storage, target, name)
