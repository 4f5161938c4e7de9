"""The verdict of several ranks about one piece of work, and how it reads as an error. Pure data."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from patchers.errors import CollectiveError
from patchers.names import fold_indices


class ConnectionCutError(CollectiveError):
    """Sending or receiving broke off. The rank at the other end knows why; the vote that follows tells it.

    Attributes:
        waited: Seconds for which this rank had waited then.
    """

    waited = 0.0


def cut_off(peer: int, error: RuntimeError, waited: float = 0.0) -> ConnectionCutError:
    """Return the error of a transfer that broke off, in gloo's words without the place in its source."""
    why = re.sub(r"^\[[^]]*\]\s*", "", str(error).splitlines()[0])
    cut = ConnectionCutError(f"the connection to rank {peer} broke: {why}", {peer: why})
    cut.waited = waited
    return cut


@dataclass(frozen=True)
class Verdict:
    """What all ranks agree to have happened in one round.

    Attributes:
        entries: What each rank said (see `entry`), in rank order; None for those that said nothing.
        absent: Why, for each rank that is to blame for the lack of an answer.
    """

    entries: tuple[Any, ...]
    absent: dict[int, str]

    @property
    def breaks_connections(self) -> bool:
        """Whether ranks are lost, or connections between ranks were cut."""
        return bool(self.absent) or any(_kind(entry) == "cut" for entry in self.entries)


def entry(act: str, doing: str, error: BaseException | None, value: Any = None) -> dict[str, Any]:
    """Return what one rank says in a round, as plain JSON data."""
    told = None
    if isinstance(error, CollectiveError):
        kind = "cut" if isinstance(error, ConnectionCutError) else "shared"
        told = {"kind": kind, "text": str(error), "failures": {str(k): v for k, v in error.failures.items()}}
    elif error is not None:
        told = {"kind": "own", "text": f"{type(error).__name__}: {error}"}
    return {"act": act, "doing": doing, "value": value, "error": told}


def judge(verdict: Verdict) -> CollectiveError | None:
    """Return the error of a round, or None if all ranks were there, in step and well.

    Example:
        >>> ranks = (entry("vote", "reading x", None), entry("vote", "reading x", OSError("disk gone")))
        >>> judge(Verdict(ranks, {}))
        CollectiveError('reading x failed on rank 1 of 2: OSError: disk gone; rank 0 was well')
    """
    said = {rank: said for rank, said in enumerate(verdict.entries) if said is not None}
    errors = {rank: told["error"] for rank, told in said.items() if told["error"]}
    has_cause = any(error["kind"] != "cut" for error in errors.values())  # why a rank left the common way
    if not has_cause and (confusion := _out_of_step(said)):
        return CollectiveError(confusion, {rank: f"at {said[rank]['doing']!r}" for rank in said})
    if not errors and not verdict.absent:
        return None
    if not verdict.absent and _all_the_same_shared(errors.values()):
        first = next(iter(errors.values()))
        return CollectiveError(first["text"], {int(rank): why for rank, why in first["failures"].items()})
    cut = {rank: error["text"] for rank, error in errors.items() if error["kind"] == "cut"}
    causes = {rank: error["text"] for rank, error in errors.items() if rank not in cut} | verdict.absent
    if not causes:
        causes, cut = cut, {}
    well = [rank for rank in said if rank not in errors]
    first = min(set(causes) & set(said), default=min(said))
    text = _text(said[first]["doing"], causes, cut, well, len(verdict.entries))
    return CollectiveError(text, dict(sorted(causes.items())))


def _kind(said: Any) -> str | None:
    return said["error"]["kind"] if said and said["error"] else None


def _all_the_same_shared(errors: Iterable[dict[str, Any]]) -> bool:
    """Whether an earlier verdict is what all of these say: then it stays what it is."""
    texts = {(error["kind"], error["text"]) for error in errors}
    return len(texts) == 1 and next(iter(texts))[0] == "shared"


def _out_of_step(said: dict[int, dict[str, Any]]) -> str | None:
    """Tell ranks that are at different work; they would take each other's values for something else."""
    places: dict[tuple[str, str], list[int]] = {}
    for rank, told in said.items():
        places.setdefault((told["act"], _gist(told["doing"])), []).append(rank)
    if len(places) < 2:
        return None
    where = [f"{_ranks(ranks)} at {said[ranks[0]]['doing']!r}" for ranks in places.values()]
    return (
        f"the ranks are out of step: {'; '.join(where)}. "
        "All ranks must make the same calls in the same order, and none alone inside an `if`."
    )


def _gist(doing: str) -> str:
    """Leave the words that are the same on all ranks: no paths, no numbers."""
    return " ".join(word for word in doing.split() if not re.search(r"[/\\\d]", word))


def _text(doing: str, causes: dict[int, str], cut: Collection[int], well: Collection[int], count: int) -> str:
    groups: dict[str, list[int]] = {}
    for rank, cause in sorted(causes.items()):
        groups.setdefault(cause.rstrip(" .\n"), []).append(rank)
    parts = [cause if len(groups) == 1 else f"{_ranks(ranks)}: {cause}" for cause, ranks in groups.items()]
    if cut:
        parts.append(f"{_ranks(cut)} {_were(cut)} cut off")
    if well:
        parts.append(f"{_ranks(well)} {_were(well)} well")
    where = f"all {count} ranks" if len(causes) == count else f"{_ranks(causes)} of {count}"
    return f"{doing} failed on {where}: {'; '.join(parts)}"


def _ranks(ranks: Collection[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + fold_indices(ranks)


def _were(ranks: Collection[int]) -> str:
    return "was" if len(ranks) == 1 else "were"
