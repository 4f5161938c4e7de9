"""What a load did, for people to read and for programs to check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from patchers.names import fold, fold_indices
from patchers.tables import Table, as_html


@dataclass(frozen=True)
class LoadReport:
    """What was read into a shard, and what was odd about it. True when nothing was odd.

    Attributes:
        location: Where the checkpoint is.
        revision: Which one of a hub id's, if one was asked for.
        directory: The absolute path of a local one: after a `chdir`, `location` may lead elsewhere.
        blocks: The blocks that the shard owns.
        num_blocks: How many the whole model has.
        tensors: How many tensors were filled.
        nbytes: Their size in memory, in bytes.
        seconds: How long the load took.
        route: `direct` (assigned as they are) or `converted` (through transformers' loader).
        unexpected: Keys of the checkpoint that the whole model does not want.
        ignored: Keys that the family says may be left over.
        cast: The names of tensors that were cast to the model's dtype, by `"found -> made"`.
        dequantised: How many tensors were computed from quantised ones and their scales.
        cast_asked: Whether the caller asked for a dtype; else the config and the files disagree.
        tied: Names that share one parameter with another.
        untied: Names that the config calls tied, but whose values differ: they were kept apart.
    """

    location: str
    blocks: tuple[int, ...]
    num_blocks: int
    tensors: int
    nbytes: int
    seconds: float
    route: str
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    cast: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dequantised: int = 0
    cast_asked: bool = False
    tied: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    revision: str | None = None
    directory: str | None = None

    def __bool__(self) -> bool:
        return not (self.unexpected or self.untied or (self.cast and not self.cast_asked))

    def __str__(self) -> str:
        title, *lines = self._lines()
        return "\n  ".join([title, *lines])

    def _repr_html_(self) -> str:
        title, *lines = self._lines()
        return as_html([Table([["report"], *([line] for line in lines or ["nothing odd"])], title)])

    def _lines(self) -> list[str]:
        owned = fold_indices(self.blocks) or "none"
        lines = [
            f"{self.location}: blocks {owned} of {self.num_blocks}, {self.tensors} tensors, "
            f"{self.nbytes / 1e6:.1f} MB in {self.seconds:.2f} s ({self.route})"
        ]
        why = "as asked" if self.cast_asked else "the config says so, the files do not"
        lines += [f"cast {kind} ({why}): {len(names)} tensors" for kind, names in self.cast.items()]
        lines += [f"dequantised: {self.dequantised} tensors"] if self.dequantised else []
        lines += [f"unexpected: {fold(self.unexpected)}"] if self.unexpected else []
        lines += [f"ignored: {fold(self.ignored)}"] if self.ignored else []
        lines += [f"kept apart although the config says tied: {fold(self.untied)}"] if self.untied else []
        return lines
