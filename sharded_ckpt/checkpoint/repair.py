"""A new index for a checkpoint whose index is lost or wrong, from what the files themselves say."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from patchers.errors import CheckpointError, CheckpointNotFoundError
from sharded_ckpt.checkpoint.index import (
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointIndex,
    index_of_headers,
    parse_index,
)
from sharded_ckpt.checkpoint.local import LocalSource
from sharded_ckpt.checkpoint.manifest import MANIFEST_FILE
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.checkpoint.shard_names import SHARD, shard_name
from sharded_ckpt.checkpoint.source import check_name, read_source_header

logger = logging.getLogger(__name__)


def rebuild_index(
    checkpoint: str | os.PathLike[str], *, files: Iterable[str] | None = None, durable: bool = True
) -> CheckpointIndex:
    """Write `model.safetensors.index.json` anew from the headers of the files, in one atomic step.

    Args:
        checkpoint: A local directory.
        files: The files that hold the tensors, relative to it. If not given: the numbered shards and what the
            present index lists; if there are none, `model.safetensors`; without that, every safetensors file
            in the directory and below.
        durable: Whether the new index must survive a power cut once this returns.

    Returns:
        The new index.

    Raises:
        CheckpointNotFoundError: There are no such files.
        CheckpointError: A file is broken, a shard is missing, or two files hold the same tensor.
    """
    source = LocalSource(checkpoint)
    if files is None:
        names = _candidates(source)
        _refuse_gaps(source.location, names)
    else:
        names = [check_name(name, "files") for name in files]
    if not names:
        raise CheckpointNotFoundError(f"{source.location}: no safetensors files to make an index of")
    headers = {name: read_source_header(source, name) for name in sorted(names)}
    index = index_of_headers(source.location, headers)
    present = _present(source)
    metadata = {**(present.metadata if present else {}), "total_size": index.total_size}
    content: dict[str, Any] = {"metadata": metadata, "weight_map": dict(sorted(index.weight_map.items()))}
    with transaction(checkpoint, durable=durable, manifest=source.exists(MANIFEST_FILE)) as save:
        save.write_bytes(INDEX_FILE, json.dumps(content, indent=2).encode() + b"\n")
    return CheckpointIndex(source.location, index.weight_map, index.total_size, metadata, INDEX_FILE)


def _candidates(source: LocalSource) -> list[str]:
    shards = filter(None, map(SHARD.fullmatch, source.names()))
    found = {shard[0] for shard in shards if shard["stem"] == "model"}
    if present := _present(source):
        found.update(name for name in present.files if source.exists(name))
    if not found and source.exists(SINGLE_FILE):
        found = {SINGLE_FILE}  # what lies beside it, such as an adapter, is no part of it
    root = Path(source.directory)
    below = (path.relative_to(root).as_posix() for path in root.rglob("*.safetensors") if path.is_file())
    return sorted(found or below)


def _present(source: LocalSource) -> CheckpointIndex | None:
    """Return the index that is there, if it can be read."""
    if not source.exists(INDEX_FILE):
        return None
    try:
        return parse_index(source.read_bytes(INDEX_FILE), location=source.location, file=INDEX_FILE)
    except CheckpointError as error:
        logger.warning("the present index is of no help: %s", error)
        return None


def _refuse_gaps(location: str, names: Iterable[str]) -> None:
    """Refuse a set of shards that is not complete, or not one set: the new index would hide it."""
    sets: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, map(SHARD.fullmatch, names)):
        stem = match["stem"] + (f"-{match['token']}" if match["token"] else "")
        sets.setdefault((stem, int(match["count"])), set()).add(int(match["number"]))
    if len(sets) > 1:
        kinds = ", ".join(f"{stem}-*-of-{count:05d}" for stem, count in sorted(sets))
        raise CheckpointError(
            f"{location}: shards of several saves: {kinds}; give the folder of those that are meant, or "
            "`files`, or move the others away"
        )
    for (stem, count), numbers in sets.items():
        if missing := sorted(set(range(1, count + 1)) - numbers):
            lost = ", ".join(shard_name(stem, number, count) for number in missing[:8])
            raise CheckpointError(f"{location}: {len(missing)} of {count} shards are missing: {lost}")
