"""Where a rank puts its files while a save is prepared."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt.checkpoint.contents import SUFFIX, RankRecord, StagedFile
from sharded_ckpt.checkpoint.layout import nbytes_of, plan_shards
from sharded_ckpt.checkpoint.manifest import MANIFEST_FILE
from sharded_ckpt.checkpoint.source import INDEX_SUFFIX, check_name
from sharded_ckpt.checkpoint.storage import LocalStorage, PathLike
from sharded_ckpt.checkpoint.tree import copy_file, make_parents, write_small
from sharded_ckpt.checkpoint.writer import LazyTensor, describe, write_tensors

if TYPE_CHECKING:
    import torch


class Transaction:
    """One save, while it is prepared: where a rank puts its files. Made by `transaction`.

    All names are relative to the directory that is saved to and use `/`. No method waits for other ranks.
    """

    def __init__(
        self, stage: Path, rank: int, storage: LocalStorage, *, digest: bool, record: RankRecord | None = None
    ) -> None:
        self._stage, self._storage, self._digest = stage, storage, digest
        self._record = RankRecord(rank) if record is None else record
        self._open = True

    @property
    def path(self) -> Path:
        """The stage: whatever is put here, also by others, is published under the same name."""
        return self._stage

    def write_tensors(
        self,
        tensors: Mapping[str, torch.Tensor | LazyTensor],
        stem: str = "model",
        *,
        max_shard_size: int | str | None = None,
        metadata: Mapping[str, str] | None = None,
        index_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write tensors to shards `<stem>-0000r-of-0000n.safetensors` and `<stem>.safetensors.index.json`.

        All ranks write to the same stem, each its own tensors, possibly none; shards are numbered in the
        order of ranks. The save replaces every older file of that stem.

        Args:
            tensors: Names that no other rank writes.
            stem: Begin of the file names.
            max_shard_size: Bytes of tensors in one file, or a text such as `"5GB"`; one file if not given.
            metadata: Strings for the headers; `{"format": "pt"}` if not given.
            index_metadata: What the index shall say besides `total_size`.

        Raises:
            CheckpointError: A tensor cannot be written; the message names it.
        """
        self._check(stem)
        index = stem + SUFFIX + INDEX_SUFFIX
        self._record.indexes.setdefault(index, {}).update(index_metadata or {})
        sizes = {name: nbytes_of(*spec) for name, spec in describe(tensors).items()}
        for names in plan_shards(sizes, max_shard_size):
            staged = f".rank-{self._record.rank:05d}-{len(self._record.files):05d}{SUFFIX}"
            shard = {name: tensors[name] for name in names}
            self._write(staged, stem, shard, metadata, numbered=True, index=index)

    def write_file(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor | LazyTensor],
        *,
        index: str | None = None,
        metadata: Mapping[str, str] | None = None,
        index_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write tensors to one safetensors file of a given name; one rank does so for each name.

        Args:
            name: The file, ending in `.safetensors`.
            tensors: What it holds.
            index: The index that lists its tensors, none if not given. Its folder is the file's, or above it.
            metadata: Strings for the header; `{"format": "pt"}` if not given.
            index_metadata: What the index shall say besides `total_size`.
        """
        self._check(name)
        if not name.endswith(SUFFIX):
            raise ConfigError(f"{name}: tensors go into files whose name ends in {SUFFIX}")
        if index is not None:
            self._check(index)
            if not name.startswith(index[: index.rfind("/") + 1]):
                raise ConfigError(f"{name}: cannot be listed by {index}, which lies in another folder")
            self._record.indexes.setdefault(index, {}).update(index_metadata or {})
        self._write(name, name, tensors, metadata, numbered=False, index=index)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file; one rank does so for each name."""
        write_small(self._storage, self._place(name), data)
        sha256 = hashlib.sha256(data).hexdigest()
        self._record.files.append(StagedFile(name, name, len(data), sha256=sha256))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, indented as Hugging Face does; one rank does so for each name."""
        self.write_bytes(name, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def copy(self, source: PathLike, name: str | None = None) -> None:
        """Copy a file into the checkpoint, under its own name if no other is given."""
        copy_file(self._storage, source, self._place(name or Path(source).name))

    def supersede(self, *patterns: str) -> None:
        """Say which files, if they are there already, do not stay: `*` stands for any text, `/` included.

        Files that are not written by the save and not superseded stay as they are. The older files of a stem
        that is written are superseded without a word.
        """
        self._record.superseded.extend(patterns)

    def expect(self, keys: Iterable[str], stem: str = "model") -> None:
        """Say which tensors all ranks together write to a stem; the save fails if they have not."""
        self._record.expected.setdefault(stem + SUFFIX + INDEX_SUFFIX, []).extend(keys)

    def lend(self) -> dict[str, Any]:
        """Return what `borrow` needs, as plain data, to go on with this rank's share in another process.

        Until that process has told what it has staged (`settle`), nothing may be staged here.
        """
        self._require_open("lend it")
        return {
            "stage": os.fspath(self._stage),
            "durable": self._storage.durable,
            "digest": self._digest,
            "record": self._record.to_json().decode(),
        }

    @classmethod
    def borrow(cls, lent: Mapping[str, Any]) -> Transaction:
        """Return a rank's end of a save that another process lends; `close` gives what to tell that one."""
        record = RankRecord.from_json(lent["record"].encode())
        storage = LocalStorage(durable=lent["durable"])
        return cls(Path(lent["stage"]), record.rank, storage, digest=lent["digest"], record=record)

    def settle(self, record: RankRecord) -> None:
        """Take over what the borrower has staged."""
        self._require_open("take over what another process has staged")
        self._record = record

    def close(self) -> RankRecord:
        """Return what was staged; nothing more can be."""
        self._open = False
        return self._record

    def _write(
        self,
        staged: str,
        name: str,
        tensors: Mapping[str, torch.Tensor | LazyTensor],
        metadata: Mapping[str, str] | None,
        *,
        numbered: bool,
        index: str | None,
    ) -> None:
        path = self._place(staged)
        done = write_tensors(path, tensors, metadata=metadata, digest=self._digest, storage=self._storage)
        staged_file = StagedFile(staged, name, done.file_size, numbered, index, done.tensors, done.sha256)
        self._record.files.append(staged_file)

    def _place(self, name: str) -> Path:
        self._check(name)
        make_parents(self._storage, self._stage, name)
        if os.path.lexists(self._stage / name):
            raise CheckpointError(f"{name}: written twice in one save, by this rank or by another one")
        return self._stage / name

    def _require_open(self, doing: str) -> None:
        if not self._open:
            raise RuntimeError(f"cannot {doing}: the save that this belongs to is over")

    def _check(self, name: str) -> None:
        self._require_open(f"write {name}")
        check_name(name, "save")
        if name == MANIFEST_FILE:
            raise ConfigError(f"{MANIFEST_FILE} is written by the save itself: ask for it with manifest=True")
