"""How several processes agree on the fate of one piece of work, seen from the files' side.

The checkpoint layer knows nothing of torch.distributed: it asks a `Coordinator`. `Solo` is the one of a
single process; `sharded_ckpt.collective.control_group` has the one that spans ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from patchers.errors import ConfigError
from patchers.names import fold_indices


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


def refuse_disagreement(said: Sequence[Mapping[str, Any]], doing: str) -> None:
    """Raise on every rank if the ranks do not mean the same.

    Args:
        said: What each rank says, in rank order, as `gather` gave it.
        doing: What cannot be done then ("save to …").

    Raises:
        ConfigError: It names what they disagree on, and who says what.

    Example:
        >>> refuse_disagreement([{"step": 1}, {"step": 2}], "save")
        Traceback (most recent call last):
        patchers.errors.ConfigError: cannot save: the ranks disagree on `step`: 1 on rank 0; 2 on rank 1
    """
    for name in dict.fromkeys(name for words in said for name in words):
        ranks: dict[str, list[int]] = {}
        for rank, words in enumerate(said):
            ranks.setdefault(repr(words.get(name)), []).append(rank)
        if len(ranks) > 1:
            views = "; ".join(f"{text:.200} on rank {fold_indices(which)}" for text, which in ranks.items())
            raise ConfigError(f"cannot {doing}: the ranks disagree on `{name}`: {views}")
