"""A shard that does not fit into memory, said in words that help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from patchers.errors import ShardMemoryError
from patchers.tables import amount


@contextmanager
def explained_shortage(location: str, nbytes: int, device: torch.device) -> Iterator[None]:
    """Say of memory that runs out what it was for, and what to do.

    Args:
        location: The checkpoint.
        nbytes: What the shard takes in the files.
        device: Where it is to be.

    Raises:
        ShardMemoryError: The work inside ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ShardMemoryError(
            f"{location}: this rank's blocks do not fit into the memory of {device}: they take "
            f"{amount(nbytes, 'bytes')} in the files ({reason}). Own fewer blocks, over more "
            "ranks (`sharded-ckpt plan` with --memory says how many it takes), choose a smaller dtype, or on "
            "the CPU leave out materialize and dtype: then the files are mapped, not copied"
        ) from error


def _is_shortage(error: BaseException) -> bool:
    # the allocator of the CPU raises a plain RuntimeError
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
