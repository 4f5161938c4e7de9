"""How several processes agree on the fate of one piece of work, seen from the files' side.

The checkpoint layer knows nothing of torch.distributed: it asks a `Coordinator`. `Solo` is the one of a
single process; `sharded_ckpt.collective.control_group` has the one that spans ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Coordinator(Protocol):
    """Ranks that do something together. Every method is collective: all ranks call it, in the same order."""

    rank: int
    world_size: int

    def gather(self, value: Any, doing: str) -> list[Any]:
        """Return the small plain value (JSON-like) of every rank, in rank order, on every rank."""

    def vote(self, error: BaseException | None, doing: str) -> None:
        """Raise on every rank if any rank brings an error.

        Raises:
            CollectiveError: The same text on all ranks; it names the failed ranks and their causes.
        """


class Solo:
    """The coordinator of one process: it agrees with itself, and its errors stay what they are."""

    rank = 0
    world_size = 1

    def gather(self, value: Any, doing: str) -> list[Any]:
        """Return `[value]`."""
        return [value]

    def vote(self, error: BaseException | None, doing: str) -> None:
        """Raise `error` if there is one."""
        if error is not None:
            raise error


@contextmanager
def together(coordinator: Coordinator, doing: str) -> Iterator[None]:
    """Run rank-local work that may fail, then vote: all ranks leave this block well, or all raise.

    Nothing inside may wait for another rank, or a failed rank would be waited for.

    Args:
        coordinator: Who takes part.
        doing: What is being done, as it should stand in the error ("reading the shards of …").
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # whatever it is, the other ranks must hear of it
        error = caught
    coordinator.vote(error, doing)
