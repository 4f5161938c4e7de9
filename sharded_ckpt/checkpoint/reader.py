"""Reads tensors of a checkpoint: only the files and the bytes that are asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.cross_check import ghost_keys, missing_files, report_size, report_unlisted
from sharded_ckpt.checkpoint.entry import TensorEntry
from sharded_ckpt.checkpoint.garbage import paused_collection
from sharded_ckpt.checkpoint.index import CheckpointIndex, open_index
from sharded_ckpt.checkpoint.ranges import coalesce
from sharded_ckpt.checkpoint.read_ahead import ReadAhead
from sharded_ckpt.checkpoint.shard import Plan, Progress, Shard
from sharded_ckpt.checkpoint.source import TensorSource, open_source
from sharded_ckpt.checkpoint.windows import Item

if TYPE_CHECKING:
    import torch

    from sharded_ckpt.checkpoint.tensors import DtypeRule

logger = logging.getLogger(__name__)

_MAX_OPEN_SHARDS = 128
"""Of the 1024 files that a process may have open; others are opened again when they are needed."""

_ATTEMPTS = 100
"""A saver that does nothing but save can win many times in a row."""


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
        self._unlisted_bytes = 0
        self._ahead: set[str] = set()
        self._whole: Plan | None = None

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

    def plan(self, keys: Iterable[str] | None = None) -> Plan:
        """Return the files that hold the tensors, opened, each with its tensors in file order."""
        if keys is not None and keys is not self.index:
            return self._plan(self.index.by_file(keys))
        if self._whole is None:
            self._whole = self._plan(self.index.by_file())
        return self._whole

    def _plan(self, groups: dict[str, list[str]]) -> Plan:
        with paused_collection():
            self._open(groups)
            return [(self._shards[file], self._entries(file, group)) for file, group in groups.items()]

    def prefetch(self, keys: Iterable[str] | None = None) -> ReadAhead:
        """Start bringing the bytes of tensors into the page cache, and return at once.

        What is read afterwards is the same, only sooner here. Call it before the model is imported and built.
        """
        return self._read_ahead(self.plan(keys))

    def read(
        self,
        keys: Iterable[str] | None = None,
        *,
        device: torch.device | str | int = "cpu",
        dtype: DtypeRule = None,
        materialize: bool = False,
        ring: bool = False,
        read_ahead: bool = True,
        progress: Progress | None = None,
    ) -> dict[str, torch.Tensor]:
        """Read tensors.

        On the CPU nothing is copied unless it is asked for: a tensor lies in a private mapping of its file.
        Changing it changes only this process's memory. The file must not be shortened while such tensors live
        (the system would kill the process with SIGBUS): our saves never do that, they put new files in place
        of old ones; where others may, or where files lie on a network, use `materialize`.

        Args:
            keys: Tensor names, all if not given.
            device: Where the tensors go.
            dtype: None keeps what the files have; a floating dtype casts tensors of ordinary floating dtypes
                (quantized ones of one byte or less and integers stay); a function gets each name with the
                dtype found and says which one to have.
            materialize: Read into memory of their own, by several threads, instead of mapping.
            ring: Carry the tensors through a ring of buffers on the CPU too, as for other devices.
            read_ahead: Bring what is mapped into the page cache in the background, unless `prefetch` was
                called for it: a hint, which changes no result.
            progress: Called with the number of bytes done since the last call, possibly by several threads.

        Returns:
            The tensors in file order.

        Raises:
            MissingKeysError: The index has no such tensors.
            CheckpointError: Files are missing, broken or changed meanwhile, or torch lacks a dtype of theirs.
            ConfigError: `dtype` is not a floating one.
        """
        from sharded_ckpt.checkpoint.transfer import read_tensors

        plan = self.plan(keys)
        self.source.ensure(shard.name for shard, _ in plan)
        if read_ahead and not (materialize or ring) and str(device) == "cpu":
            self._read_ahead(plan)
        tensors: dict[str, torch.Tensor] = {}
        for part in _batches(plan):
            tensors |= read_tensors(
                part, device=device, dtype=dtype, materialize=materialize, ring=ring, progress=progress
            )
        self._refuse_changed(plan)
        return tensors

    def iter_tensors(
        self, keys: Iterable[str] | None = None, *, dtype: DtypeRule = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors on the CPU one by one, in file order, to build something of them.

        Each lies in a mapping of a few megabytes (or of itself, if it is larger) that goes when its tensors
        go: what is copied from and dropped takes no memory, what is kept or changed stays as it is.

        Args:
            keys: As for `read`.
            dtype: As for `read`.

        Example:
            >>> reader = open_checkpoint(checkpoint)  # the path of a checkpoint
            >>> for key, tensor in reader.iter_tensors(["model.norm.weight"]):
            ...     print(key, tuple(tensor.shape))
            model.norm.weight (64,)
        """
        from sharded_ckpt.checkpoint.transfer import iter_tensors

        plan = self.plan(keys)
        self.source.ensure(shard.name for shard, _ in plan)
        tensors = chain.from_iterable(iter_tensors(part, dtype=dtype) for part in _batches(plan))
        return chain(tensors, self._end(plan))

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid, and files are opened again when needed."""
        for shard in self._shards.values():
            shard.close()

    def _refuse_changed(self, plan: Plan) -> None:
        """Refuse what was fetched range by range while another file took its place; open files stay."""
        if not all(self.source.is_here(shard.name) for shard, _ in plan) and self.source.changed():
            raise CheckpointError(f"{self.source.location}: a file was changed while it was read; load again")

    def _end(self, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
        self._refuse_changed(plan)
        yield from ()

    def _read_ahead(self, plan: Plan) -> ReadAhead:
        """Start reading ahead what no call before this one did."""
        jobs = []
        for shard, items in plan[:_MAX_OPEN_SHARDS]:
            if shard.attach():
                ranges = ((entry.begin, entry.end) for key, entry in items if key not in self._ahead)
                with suppress(OSError):  # too many open files are no reason to fail for a hint
                    jobs.append((os.dup(shard.fileno()), coalesce(ranges)))
            self._ahead.update(key for key, _ in items)
        return ReadAhead(jobs)

    def _open(self, groups: dict[str, list[str]]) -> None:
        """Open the files that are not open yet; all that do not exist are named in one error."""
        new = [file for file in groups if file not in self._shards]
        if missing := self.source.missing(new):
            raise missing_files(self.source, self.index, missing, groups)
        for file in new:
            self._shards[file] = shard = Shard(self.source, file)
            if len(self._shards) > _MAX_OPEN_SHARDS:
                shard.close()
            if len(groups[file]) != len(shard.header.tensors):  # else all are asked for, and looked up next
                self._unlisted_bytes += report_unlisted(self.index, file, shard.header)
        if new and len(self._shards) == len(self.index.files):
            headers = [shard.header for shard in self._shards.values()]
            report_size(self.index, sum(h.file_size - h.data_begin for h in headers) - self._unlisted_bytes)

    def _entries(self, file: str, keys: list[str]) -> list[Item]:
        """Return the tensors of a file in file order."""
        tensors = self._shards[file].header.tensors
        if not all(map(tensors.__contains__, keys)):
            raise ghost_keys(self.index, file, [key for key in keys if key not in tensors])
        if len(keys) == len(tensors):
            return list(tensors.items())
        return sorted(((key, tensors[key]) for key in keys), key=lambda item: item[1][2:])


def _batches(plan: Plan) -> Iterator[Plan]:
    """Give the files of a plan in batches of as many as may be open, and close all but the first."""
    for start in range(0, len(plan), _MAX_OPEN_SHARDS):
        part = plan[start : start + _MAX_OPEN_SHARDS]
        yield part
        if start:
            for shard, _ in part:
                shard.close()


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
    for _ in range(_ATTEMPTS):
        source = open_source(location, **options)
        try:
            reader = CheckpointReader(source, open_index(source))
            if wanted is not None:
                reader.plan(wanted(reader.index))
            return reader
        except CheckpointError:
            if not source.changed():
                raise
            logger.info("%s was replaced while it was opened; opening it again", location)
    raise CheckpointError(
        f"{location} is replaced faster than it can be opened; wait until its writer is done"
    )
