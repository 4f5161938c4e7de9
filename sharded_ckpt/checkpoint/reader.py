"""Reads tensors of a checkpoint: only the files and the bytes that are asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from patchers.errors import CheckpointError, CheckpointNotFoundError
from patchers.names import fold
from sharded_ckpt.checkpoint.entry import TensorEntry
from sharded_ckpt.checkpoint.garbage import paused_collection
from sharded_ckpt.checkpoint.index import CheckpointIndex, open_index
from sharded_ckpt.checkpoint.ranges import ReadAhead, coalesce
from sharded_ckpt.checkpoint.shard import Shard
from sharded_ckpt.checkpoint.source import TensorSource, open_source

if TYPE_CHECKING:
    import torch

    from sharded_ckpt.checkpoint.copying import Progress

    DtypeRule: TypeAlias = "torch.dtype | Callable[[str, torch.dtype], torch.dtype] | None"

logger = logging.getLogger(__name__)

_MAX_OPEN_SHARDS = 128
"""Of the 1024 files that a process may have open; others are opened again when they are needed."""

_ATTEMPTS = 5

Items: TypeAlias = "list[tuple[str, TensorEntry]]"


class CheckpointReader:
    """Reads tensors of one checkpoint by name.

    Importing this module imports no torch, nor does anything here but `read` and `iter_tensors`.

    Args:
        source: Where the files are.
        index: Which file holds which tensor.
    """

    def __init__(self, source: TensorSource, index: CheckpointIndex) -> None:
        self.source = source
        self.index = index
        self._shards: dict[str, Shard] = {}

    def headers(self, keys: Iterable[str] | None = None) -> dict[str, TensorEntry]:
        """Return dtype, shape and place of tensors; opens only the files that hold them.

        Args:
            keys: Tensor names, all of the checkpoint if not given.

        Raises:
            MissingKeysError: The index has no such tensors.
            CheckpointNotFoundError: Files that hold them do not exist; all of them are named.
            CheckpointError: A file is broken, or lacks a tensor that the index says it holds.
        """
        return {key: entry for _, items in self.plan(keys) for key, entry in items}

    def plan(self, keys: Iterable[str] | None = None) -> list[tuple[Shard, Items]]:
        """Return the files that hold the tensors, opened, each with its tensors in file order."""
        with paused_collection():
            groups = self.index.by_file(keys)
            self._open(groups)
            return [(self._shards[file], self._entries(file, group)) for file, group in groups.items()]

    def prefetch(self, keys: Iterable[str] | None = None) -> ReadAhead:
        """Start bringing the bytes of tensors into the page cache, and return at once.

        What is read afterwards is the same, only sooner here. Call it before the model is imported and built.
        """
        jobs = [
            (os.dup(shard.fileno()), coalesce((entry.begin, entry.end) for _, entry in items))
            for shard, items in self.plan(keys)
            if shard.is_local
        ]
        return ReadAhead(jobs)

    def read(
        self,
        keys: Iterable[str] | None = None,
        *,
        device: torch.device | str | int = "cpu",
        dtype: DtypeRule = None,
        materialize: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, torch.Tensor]:
        """Read tensors, in file order."""
        from sharded_ckpt.checkpoint.copying import copy_tensors
        from sharded_ckpt.checkpoint.tensors import view_tensors

        plan = self.plan(keys)
        with paused_collection():
            tensors: dict[str, torch.Tensor] = {}
            if materialize or not all(shard.is_local for shard, _ in plan):
                tensors = copy_tensors(plan, progress)
            else:
                for shard, items in plan:
                    tensors.update(view_tensors(shard.map()[0], items, shard.file))
        for key, tensor in tensors.items():
            target = dtype(key, tensor.dtype) if callable(dtype) else dtype
            plain = callable(dtype) or (tensor.is_floating_point() and tensor.dtype.itemsize > 1)
            if target is not None and plain:
                tensors[key] = tensor.to(target)
            tensors[key] = tensors[key].to(device)
        return tensors

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid, and files are opened again when needed."""
        for shard in self._shards.values():
            shard.close()

    def _open(self, groups: dict[str, list[str]]) -> None:
        """Open the files that are not open yet; all that do not exist are named in one error."""
        new = [file for file in groups if file not in self._shards]
        missing = [file for file in new if not self.source.exists(file)]
        if missing:
            raise self._missing(missing, groups)
        self.source.ensure(new)
        for file in new:
            self._shards[file] = shard = Shard(self.source, file)
            if len(self._shards) > _MAX_OPEN_SHARDS:
                shard.close()
            self._compare(file, shard)

    def _missing(self, missing: list[str], groups: dict[str, list[str]]) -> CheckpointNotFoundError:
        names = set(self.source.names())
        lines = [f"{file} ({len(groups[file])} tensors: {fold(groups[file], limit=3)})" for file in missing]
        other = {name.lower(): name for name in names}
        similar = [other[file.lower()] for file in missing if file.lower() in other]
        hint = f"; names differ in case from {', '.join(similar)}" if similar else ""
        return CheckpointNotFoundError(
            f"{self.source.location}: {len(missing)} of the {len(groups)} files needed do not exist: "
            f"{'; '.join(lines[:8])}{hint}; fetch them, or correct {self.index.file or 'the index'}"
        )

    def _compare(self, file: str, shard: Shard) -> None:
        """Say what a header holds that the index does not know, or places in another file."""
        weight_map = self.index.weight_map
        if others := [key for key in shard.header.tensors if weight_map.get(key) != file]:
            logger.warning(
                "%s: the index does not name this file for %d of its tensors, which are ignored: %s",
                shard.file,
                len(others),
                fold(others),
            )

    def _entries(self, file: str, keys: list[str]) -> Items:
        tensors = self._shards[file].header.tensors
        try:
            items = [(key, tensors[key]) for key in keys]
        except KeyError:
            ghosts = [key for key in keys if key not in tensors]
            raise CheckpointError(
                f"{self.source.location}/{file}: the index {self.index.file} says that this file holds "
                f"{fold(ghosts)}, but it does not; rebuild the index from the files, or fetch them again"
            ) from None
        items.sort(key=_begin)
        return items


def _begin(item: tuple[str, TensorEntry]) -> int:
    return item[1].begin


def open_checkpoint(
    location: str | os.PathLike[str],
    wanted: Callable[[CheckpointIndex], Iterable[str]] | None = None,
    **options: Any,
) -> CheckpointReader:
    """Open a checkpoint and the files that hold the tensors wanted, all of one and the same save.

    A save that replaces the checkpoint meanwhile makes this start again with the new one; afterwards it can
    come and go: the files stay open.

    Args:
        location: As `open_source` takes it.
        wanted: Chooses tensor names from the index; no file is opened if not given.
        **options: Those of `open_source`.
    """
    for attempt in range(_ATTEMPTS):
        source = open_source(location, **options)
        try:
            reader = CheckpointReader(source, open_index(source))
            if wanted is not None:
                reader.plan(wanted(reader.index))
            return reader
        except CheckpointError:
            if attempt == _ATTEMPTS - 1 or not source.changed():
                raise
            logger.info("%s: replaced while it was opened; opening it again", location)
    raise AssertionError
