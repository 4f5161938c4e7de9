"""Groups that their own ranks make by themselves, whatever other groups each of these ranks is in.

torch names such a group by its ranks and by the number of groups that this process is in. Where that number
differs (a group of the first and the last rank for tied embeddings is enough), the ranks would wait for each
other under different names, until their patience ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def memberships() -> int:
    """Return in how many process groups this process is. Torch keeps the number to itself."""
    import torch.distributed as dist

    if not dist.is_available():  # torch can be built without it
        return 0
    world = getattr(dist.distributed_c10d, "_world", None)
    return len(getattr(world, "pg_names", ()))  # a torch that has no such table may not name groups by it


@contextmanager
def as_many_memberships(most: int) -> Iterator[None]:
    """Be in so many groups, by some of this process alone, while groups are made with other ranks.

    Args:
        most: The most of all ranks that make a group together.
    """
    import torch.distributed as dist

    missing = range(most - memberships())
    alone = [dist.new_group([dist.get_rank()], use_local_synchronization=True) for _ in missing]
    try:
        yield
    finally:
        for group in alone:
            dist.destroy_process_group(group)
