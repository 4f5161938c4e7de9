"""What the ranks have staged for one save, put together: pure data, no files.

Every rank keeps a `RankRecord` of what it wrote. `Contents.merge` makes one of all, gives shards their
numbers and refuses what does not fit together.
"""

from __future__ import annotations

import fnmatch
import json
import posixpath
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from patchers.errors import CheckpointError
from patchers.names import fold, fold_indices
from sharded_ckpt.checkpoint.manifest import MANIFEST_FILE
from sharded_ckpt.checkpoint.shard_names import SHARD, SUFFIX, shard_name
from sharded_ckpt.checkpoint.source import INDEX_SUFFIX


@dataclass(frozen=True)
class StagedFile:
    """A file that a rank has staged."""

    staged: str
    """Its name in the stage; parts have `/`."""
    name: str
    """Its name in the checkpoint; of a numbered shard the stem."""
    size: int
    """Bytes."""
    numbered: bool = False
    """Whether the file is one of the shards of its stem, which get their numbers when all are known."""
    index: str | None = None
    """The index that lists its tensors, if any."""
    tensors: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each tensor."""
    sha256: str | None = None


@dataclass
class RankRecord:
    """What one rank has staged and said in one save."""

    rank: int
    files: list[StagedFile] = field(default_factory=list)
    indexes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metadata of the indexes that this rank writes for, also where it has no tensor for them."""
    superseded: list[str] = field(default_factory=list)
    """Patterns of files that the save replaces, whether it writes them or not."""
    expected: dict[str, list[str]] = field(default_factory=dict)
    """Tensors that each index must list in the end."""

    def to_json(self) -> bytes:
        """Return what `from_json` reads."""
        return json.dumps({**vars(self), "files": [vars(file) for file in self.files]}).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> RankRecord:
        """Return what `to_json` was called on."""
        fields = json.loads(raw)
        return cls(**{**fields, "files": [StagedFile(**file) for file in fields["files"]]})


@dataclass(frozen=True)
class Contents:
    """What a save will publish, but for files that were put into the stage by hand."""

    files: tuple[StagedFile, ...]
    """All with their final names."""
    indexes: Mapping[str, Mapping[str, Any]]
    """Metadata of each index."""
    superseded: tuple[str, ...] = ()

    @classmethod
    def merge(cls, records: Sequence[RankRecord]) -> Contents:
        """Put together what the ranks have staged.

        Raises:
            CheckpointError: Ranks wrote the same tensor or file, or a tensor that is expected is not there.
        """
        indexes = _merge_metadata(records)
        _check_unique(records)
        _check_complete(records)
        _check_forms(records, indexes)
        files = _numbered([file for record in records for file in record.files])
        patterns = {pattern for record in records for pattern in record.superseded}
        return cls(tuple(files), indexes, tuple(sorted(patterns)))

    def index_json(self, index: str, renamed: Mapping[str, str]) -> bytes:
        """Return the content of an index file.

        Args:
            index: Its name.
            renamed: Files that have got another name than planned.
        """
        folder, weight_map, total = index[: index.rfind("/") + 1], {}, 0
        for file in self.files:
            if file.index == index:
                name = renamed.get(file.name, file.name).removeprefix(folder)
                weight_map.update(dict.fromkeys(file.tensors, name))
                total += sum(file.tensors.values())
        content = {"metadata": {**self.indexes[index], "total_size": total}, "weight_map": weight_map}
        return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"

    def replaces(self, names: Collection[str], listed: Callable[[str], Iterable[str]]) -> set[str]:
        """Return which files of the old checkpoint this save replaces, whether it writes them again or not.

        Publishing a stem, as shards with an index or as a single file, replaces all other files of that stem.

        Args:
            names: The files of the old checkpoint.
            listed: Gives the files that an index of the old checkpoint lists.
        """
        single = [f.name for f in self.files if f.index is None and f.name.endswith(SUFFIX)]
        indexes = {*self.indexes, *(name + INDEX_SUFFIX for name in single)}
        stems = {index.removesuffix(SUFFIX + INDEX_SUFFIX) for index in indexes}
        exact = {MANIFEST_FILE, *indexes, *(stem + SUFFIX for stem in stems)}
        for index in indexes.intersection(names):
            exact.update(posixpath.join(posixpath.dirname(index), name) for name in listed(index))

        def goes(name: str) -> bool:
            if name in exact or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.superseded):
                return True
            shard = SHARD.fullmatch(name)
            return shard is not None and shard["stem"] in stems

        return set(filter(goes, names))


def _merge_metadata(records: Sequence[RankRecord]) -> dict[str, dict[str, Any]]:
    indexes: dict[str, dict[str, Any]] = {}
    for record in records:
        for index, metadata in record.indexes.items():
            merged = indexes.setdefault(index, {})
            for name, value in metadata.items():
                if merged.setdefault(name, value) != value:
                    raise CheckpointError(
                        f"{index}: the ranks disagree on its {name!r}: {merged[name]!r} before rank "
                        f"{record.rank}, {value!r} there"
                    )
    return indexes


def _numbered(files: Sequence[StagedFile]) -> list[StagedFile]:
    counts: dict[str, int] = {}
    for file in files:
        counts[file.name] = counts.get(file.name, 0) + 1
    numbers = dict.fromkeys(counts, 0)
    named = []
    for file in files:
        if file.numbered:
            numbers[file.name] += 1
            name = shard_name(file.name, numbers[file.name], counts[file.name])
            named.append(replace(file, name=name, numbered=False))
        else:
            named.append(file)
    return named


def _check_unique(records: Sequence[RankRecord]) -> None:
    writers: dict[tuple[str | None, str], list[int]] = {}
    for record in records:
        for file in record.files:
            for key in file.tensors:
                writers.setdefault((file.index or file.staged, key), []).append(record.rank)
    twice: dict[tuple[int, ...], list[str]] = {}
    for (_, key), ranks in writers.items():
        if len(ranks) > 1:
            twice.setdefault(tuple(ranks), []).append(key)
    if twice:
        texts = [f"{fold(keys)} by ranks {fold_indices(ranks)}" for ranks, keys in sorted(twice.items())]
        raise CheckpointError(
            f"tensors were written more than once: {'; '.join(texts)}; expected one rank for each"
        )


def _check_complete(records: Sequence[RankRecord]) -> None:
    expected: dict[str, set[str]] = {}
    for record in records:
        for index, keys in record.expected.items():
            expected.setdefault(index, set()).update(keys)
    files = [file for record in records for file in record.files]
    for index, wanted in expected.items():
        found = {key for file in files if file.index == index for key in file.tensors}
        if missing := wanted - found:
            raise CheckpointError(f"{index}: {len(missing)} tensors were written by no rank: {fold(missing)}")
        if surplus := found - wanted:
            raise CheckpointError(f"{index}: {len(surplus)} tensors were not expected: {fold(surplus)}")


def _check_forms(records: Sequence[RankRecord], indexes: Collection[str]) -> None:
    """Refuse a stem that is written as one file and as shards: readers would not know which one counts."""
    for record in records:
        for file in record.files:
            if file.index is None and not file.numbered and file.name + INDEX_SUFFIX in indexes:
                raise CheckpointError(
                    f"{file.name}: written beside the index {file.name + INDEX_SUFFIX}; write one"
                )
