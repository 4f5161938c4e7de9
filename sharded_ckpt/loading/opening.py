"""Opening a checkpoint for a load, even while somebody replaces it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.garbage import paused_collection
from sharded_ckpt.checkpoint.workspace import unfinished
from sharded_ckpt.loading.loader import ShardLoader
from sharded_ckpt.loading.options import LoadOptions
from sharded_ckpt.loading.pickled import open_reader
from sharded_ckpt.runtime import Runtime

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
_SETTLED_WITHIN = 2.0  # seconds; names change within milliseconds


def open_loader(
    location: str | os.PathLike[str], where: Mapping[str, Any], options: LoadOptions, runtime: Runtime
) -> ShardLoader:
    """Open a checkpoint and prepare a load; again, if a save replaces the checkpoint meanwhile."""
    for _ in range(_ATTEMPTS):
        reader = open_reader(location, **where)
        folder = Path(reader.source.location)
        _refuse_half_saved(folder)
        loader = ShardLoader(reader, options, runtime)
        try:
            with paused_collection():
                loader.prepare()
            # Configs were read by path, tensors will be of the directory that was opened.
            if unfinished(folder) is None and not reader.source.changed():
                return loader
        except CheckpointError:
            if not reader.source.changed():
                raise
        logger.info("%s was replaced while it was opened; opening it again", location)
    raise CheckpointError(
        f"{location} is replaced faster than it can be opened; wait until its writer is done"
    )


def _refuse_half_saved(folder: Path) -> None:
    """Wait for a save that is changing names in a directory: the config may be its own, the weights not yet.

    Raises:
        CheckpointError: That save does not end; it was cut off.
    """
    limit = time.monotonic() + _SETTLED_WITHIN
    while (workspace := unfinished(folder)) is not None:
        if time.monotonic() > limit:
            raise CheckpointError(
                f"{folder}: a save was cut off while it changed names here ({workspace}): the config may be "
                "of one save and the weights of another. Save again, or finish that one with "
                "sharded_ckpt.checkpoint.publish.recover(directory)"
            )
        time.sleep(0.05)
