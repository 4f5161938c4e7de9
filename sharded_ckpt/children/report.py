"""What was done to make a child."""

from __future__ import annotations

from dataclasses import dataclass

from patchers.block_config import BlockConfig
from patchers.names import fold_indices


@dataclass(frozen=True)
class ChildReport:
    """What a child is, and what was read for it.

    Attributes:
        parent: The parent checkpoint.
        path: Where the child is.
        blocks: What each block of the child is, every size said.
        changed: The blocks that are not the parent's.
        tensors: How many tensors the child has.
        nbytes: How many bytes they take.
        parent_nbytes: How many bytes those of the parent take.
        seconds: How long it took.
        warnings: What a user should know of the child.
    """

    parent: str
    path: str
    blocks: tuple[BlockConfig, ...]
    changed: tuple[int, ...]
    tensors: int
    nbytes: int
    parent_nbytes: int
    seconds: float
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.nbytes / max(self.parent_nbytes, 1)
        return "\n".join(
            (
                f"{self.path}: a child of {self.parent}, {self.tensors} tensors of "
                f"{self.nbytes / 1e6:.1f} MB, {share:.0%} of the parent's, made in {self.seconds:.1f} s",
                f"{len(self.changed)} of {len(self.blocks)} blocks differ from the parent's: "
                f"{fold_indices(self.changed) or 'none'}",
                *self.warnings,
            )
        )
