"""The index of a checkpoint: which file holds which tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

from patchers.errors import CheckpointError, CheckpointNotFoundError, MissingKeysError
from patchers.names import block_of, fold, fold_indices
from patchers.tables import Table, amount, as_html, as_text
from sharded_ckpt.checkpoint.entry import shorten
from sharded_ckpt.checkpoint.garbage import paused_collection
from sharded_ckpt.checkpoint.header import Header
from sharded_ckpt.checkpoint.index_json import parse_index_json
from sharded_ckpt.checkpoint.local import LocalSource
from sharded_ckpt.checkpoint.rival import find_difference
from sharded_ckpt.checkpoint.source import (
    INDEX_SUFFIX,
    TensorSource,
    check_name,
    read_source_header,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = SINGLE_FILE + INDEX_SUFFIX
MAX_INDEX_BYTES = 512 * 2**20
"""An index of two million tensors has a third of that."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
_PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class CheckpointIndex:
    """Which file of a checkpoint holds which tensor. Printed, and in a notebook, it is a table of the files.

    Example:
        >>> index = CheckpointIndex("ckpt", {"a": "1.st", "b": "2.st", "c": "1.st"})
        >>> len(index), "b" in index, index.files
        (3, True, ('1.st', '2.st'))
        >>> index.by_file(["c", "a"])
        {'1.st': ['c', 'a']}
    """

    location: str
    """The checkpoint, as it is named in errors."""
    weight_map: Mapping[str, str] = field(repr=False)
    """For each tensor the file that holds it, relative to the checkpoint."""
    total_size: int | None = None
    """Bytes of all tensors, if the index says so; nobody has checked that."""
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Whatever else the index says."""
    file: str | None = None
    """The index file, None if headers were read instead."""

    def __len__(self) -> int:
        return len(self.weight_map)

    def __contains__(self, key: object) -> bool:
        return key in self.weight_map

    def __iter__(self) -> Iterator[str]:
        return iter(self.weight_map)

    def __str__(self) -> str:
        return as_text([self.table])

    def _repr_html_(self) -> str:
        return as_html([self.table])

    @property
    def table(self) -> Table:
        """What it looks like: the files, how many tensors each holds, and of which blocks."""
        title = f"{self.location}: {len(self)} tensors in {len(self.files)} files"
        if self.file is not None and self.total_size is not None:
            title += f", {amount(self.total_size, 'bytes')} as {self.file} says"
        rows = [["file", "tensors", "of blocks"]]
        for file, keys in self.by_file().items():
            blocks = {block for key in keys if (block := block_of(key)) is not None}
            rows.append([file, str(len(keys)), fold_indices(blocks) or "-"])
        return Table(rows, title)

    def keys(self) -> KeysView[str]:
        """Return the names of all tensors."""
        return self.weight_map.keys()

    @cached_property
    def files(self) -> tuple[str, ...]:
        """The files that hold tensors, sorted."""
        return tuple(self._groups)

    def by_file(self, keys: Iterable[str] | None = None) -> dict[str, list[str]]:
        """Group tensor names by the file that holds them, files sorted.

        Args:
            keys: Tensor names, all if not given; a repeated one counts once.

        Raises:
            MissingKeysError: Names are not in the index.
        """
        if keys is None or keys is self:
            return {file: list(group) for file, group in self._groups.items()}
        wanted = dict.fromkeys(keys)
        try:
            return self._grouped(wanted)
        except KeyError:
            raise self._missing(wanted) from None

    @cached_property
    def _groups(self) -> dict[str, list[str]]:
        return self._grouped(self.weight_map)

    def _grouped(self, keys: Iterable[str]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for file, run in groupby(keys, self.weight_map.__getitem__):  # keys of a file stand in long runs
            groups.setdefault(file, []).extend(run)
        return {file: groups[file] for file in sorted(groups)}

    def _missing(self, wanted: Iterable[str]) -> MissingKeysError:
        missing = [key for key in wanted if key not in self.weight_map]
        related = [key for key in self.weight_map if key.endswith(missing[0]) or missing[0].endswith(key)]
        hint = f"; the checkpoint has {fold(related, limit=3)}" if related else ""
        return MissingKeysError(
            f"{self.location}: {len(missing)} of the tensors asked for are not in the checkpoint: "
            f"{fold(missing)}{hint}"
        )


def open_index(source: TensorSource) -> CheckpointIndex:
    """Find out which file of a checkpoint holds which tensor, without reading any tensor.

    The index `model.safetensors.index.json` is used where there is one, else the single file
    `model.safetensors`, else another index, single file or complete set of shards if it is the only one.

    Raises:
        CheckpointNotFoundError: There is no checkpoint.
        CheckpointError: It is broken, ambiguous, or in pickle format only.
    """
    with paused_collection():
        if source.entry is not None:
            return _read(source, source.entry)
        if source.exists(INDEX_FILE):
            index = _read(source, INDEX_FILE)
            if SINGLE_FILE not in index.files and source.exists(SINGLE_FILE):
                _refuse_rival(source, index)
            return index
        if source.exists(SINGLE_FILE):
            return _read(source, SINGLE_FILE)
        return _discover(source)


def index_of_headers(
    location: str, headers: Mapping[str, Header], metadata: Mapping[str, Any] | None = None
) -> CheckpointIndex:
    """Make the index that the headers of some files amount to.

    Args:
        location: The checkpoint, as it is named in errors.
        headers: The headers by file, names relative to the checkpoint.
        metadata: Whatever else the index shall say.

    Raises:
        CheckpointError: Two files hold a tensor of the same name.
    """
    weight_map: dict[str, str] = {}
    for file, header in headers.items():
        if twice := weight_map.keys() & header.tensors.keys():
            others = sorted({weight_map[key] for key in twice})
            raise CheckpointError(
                f"{location}: {', '.join(others)} and {file} hold the same tensors: {fold(twice)}; "
                "remove the file that is not meant, or write an index that says which one counts"
            )
        weight_map.update(dict.fromkeys(header.tensors, file))
    total = sum(entry.nbytes for header in headers.values() for entry in header.tensors.values())
    return CheckpointIndex(location, weight_map, total, dict(metadata or {}))


def _refuse_rival(source: TensorSource, index: CheckpointIndex) -> None:
    """Raise if a single file beside the index says something else: some loaders would take that one."""
    difference = find_difference(source, index, SINGLE_FILE)
    if difference:
        raise CheckpointError(
            f"{source.location}: {INDEX_FILE} and {SINGLE_FILE} are two different checkpoints: {difference}; "
            "delete the stale one (loaders differ in which they take), or give the path of the one meant"
        )


def _read(source: TensorSource, name: str) -> CheckpointIndex:
    if not name.endswith(INDEX_SUFFIX):
        return index_of_headers(source.location, {name: read_source_header(source, name)})
    where = f"{source.location}/{name}"
    if (size := source.size(name)) > MAX_INDEX_BYTES:
        raise CheckpointError(f"{where}: {size} bytes are too many for an index")
    return parse_index(source.read_bytes(name), location=source.location, file=name)


def parse_index(raw: bytes, *, location: str, file: str) -> CheckpointIndex:
    """Check the JSON of an index and return what it says.

    Args:
        raw: The JSON.
        location: The checkpoint, as it is named in errors.
        file: The index file, relative to the checkpoint; its shards are relative to the same folder.

    Raises:
        CheckpointError: Anything is wrong; the message names the index file.

    Example:
        >>> parse_index(b'{"weight_map": {"a": "m.safetensors"}}', location="c", file="i.json").weight_map
        {'a': 'm.safetensors'}
    """
    where = f"{location}/{file}"
    top = parse_index_json(raw, where)
    weight_map = top.get("weight_map") if isinstance(top, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{where}: not an index: expected an object with an object `weight_map`")
    if not set(map(type, weight_map.values())) <= {str}:
        key, name = next(item for item in weight_map.items() if not isinstance(item[1], str))
        raise CheckpointError(f"{where}: the file of {shorten(key)} must be a string, found {name!r:.80}")
    for name in set(weight_map.values()):
        check_name(name, where)
        if name.endswith(_PICKLES):
            raise CheckpointError(_pickle_text(location, [name]))
    metadata = top.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{where}: `metadata` must be an object, found {metadata!r:.80}")
    total = metadata.get("total_size")
    return CheckpointIndex(location, weight_map, total if type(total) is int else None, metadata, file)


def _discover(source: TensorSource) -> CheckpointIndex:
    """Read a checkpoint whose files are not named as usual, if it is clear what is meant."""
    names = source.names()
    candidates = [name for name in names if name.endswith(".safetensors" + INDEX_SUFFIX)]
    if not candidates:
        families = _families([name for name in names if name.endswith(".safetensors")])
        if len(families) == 1:
            (files,) = families.values()
            _check_complete(source.location, files)
            return index_of_headers(
                source.location, {name: read_source_header(source, name) for name in files}
            )
        candidates = [files[0] for files in families.values()]
    if len(candidates) == 1:
        return _read(source, candidates[0])
    if candidates:
        raise CheckpointError(
            f"{source.location}: several checkpoints are in one place: {', '.join(candidates)}; "
            "give the path of the one that is meant"
        )
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise CheckpointError(_pickle_text(source.location, pickles))
    found = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "no file"
    raise CheckpointNotFoundError(
        f"{source.location}: no checkpoint: expected {INDEX_FILE} or {SINGLE_FILE}, found {found}"
        f"{_folders_below(source)}"
    )


def _folders_below(source: TensorSource) -> str:
    """Return a hint at folders in a local one that hold weights: of trainings, of the hub's cache."""
    if not isinstance(source, LocalSource):
        return ""
    below = [path for pattern in ("*", "snapshots/*") for path in source.directory.glob(pattern)]
    full = [path for path in sorted(below) if path.is_dir() and any(path.glob("*.safetensors"))]
    held = [f"{source.location}/{path.relative_to(source.directory)}" for path in full]
    return f"; weights are in {', '.join(held[:3])}{' ...' if len(held) > 3 else ''}" if held else ""


def _families(names: Iterable[str]) -> dict[str, list[str]]:
    """Group shards of one set, `<stem>-00001-of-00003.safetensors`, by stem and count; others stay alone."""
    families: dict[str, list[str]] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        families.setdefault(f"{match['stem']}-of-{match['count']}" if match else name, []).append(name)
    return families


def _check_complete(location: str, files: list[str]) -> None:
    match = _SHARD.fullmatch(files[0])
    count = int(match["count"]) if match else 1
    if match and len(files) != count:
        raise CheckpointNotFoundError(
            f"{location}: no index, and only {len(files)} of the {count} shards {match['stem']}-*-of-"
            f"{match['count']}.safetensors; fetch the missing ones"
        )


def _pickle_text(location: str, pickles: list[str]) -> str:
    return (
        f"{location}: only pickle files ({', '.join(pickles[:8])}), which can run code when they are loaded; "
        "convert the checkpoint to safetensors, or ask for them to be read with allow_pickle=True "
        "(they are then loaded with weights_only=True)"
    )
