"""Where an index and its files contradict each other: what is an error, and what is worth a word."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import eq

from patchers.errors import CheckpointError, CheckpointNotFoundError
from patchers.names import fold
from sharded_ckpt.checkpoint.header import Header
from sharded_ckpt.checkpoint.index import CheckpointIndex
from sharded_ckpt.checkpoint.source import TensorSource

logger = logging.getLogger(__name__)


def missing_files(
    source: TensorSource, index: CheckpointIndex, missing: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> CheckpointNotFoundError:
    """Return the error for files that do not exist.

    Args:
        source: Where they should be.
        index: What says so.
        missing: Their names.
        groups: For each file that is needed the tensors wanted of it.
    """
    lines = [f"{file} ({len(groups[file])} tensors: {fold(groups[file], limit=3)})" for file in missing]
    lines = lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else [])
    names = {name.lower(): name for name in source.names()}
    similar = [names[file.lower()] for file in missing if file.lower() in names]
    hint = f"; names differ in case from {', '.join(similar)}" if similar else ""
    return CheckpointNotFoundError(
        f"{index.location}: {len(missing)} of the {len(groups)} files needed do not exist: "
        f"{'; '.join(lines)}{hint}; fetch them, or correct {index.file or 'the index'}"
    )


def ghost_keys(index: CheckpointIndex, file: str, keys: Sequence[str]) -> CheckpointError:
    """Return the error for tensors that the index places in a file that does not hold them."""
    return CheckpointError(
        f"{index.location}/{file}: the index {index.file} says that this file holds {fold(keys)}, "
        "but it does not; rebuild the index from the files, or fetch them again"
    )


def report_unlisted(index: CheckpointIndex, file: str, header: Header) -> int:
    """Say what a file holds that the index does not know or places elsewhere; return its bytes."""
    tensors, weight_map = header.tensors, index.weight_map
    if all(map(eq, map(weight_map.get, tensors), repeat(file))):
        return 0
    others = [key for key in tensors if weight_map.get(key) != file]
    logger.warning(
        "%s/%s: the index does not name this file for %d of its tensors, which are ignored: %s",
        index.location,
        file,
        len(others),
        fold(others),
    )
    return sum(tensors[key].nbytes for key in others)


def report_size(index: CheckpointIndex, found: int) -> None:
    """Say if the index is wrong about the bytes of all tensors."""
    if index.total_size is not None and index.total_size != found:
        logger.warning(
            "%s/%s: total_size is %d bytes, the tensors have %d",
            index.location,
            index.file,
            index.total_size,
            found,
        )
