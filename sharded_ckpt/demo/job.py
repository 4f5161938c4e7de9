"""What the ranks of the demo are told to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .pruning import Pruning


@dataclass(frozen=True)
class Job:
    """What the ranks are told, all the same.

    Attributes:
        parent: A checkpoint.
        variant: Another one, of the same family and with the same tokenizer.
        pruning: What the parent's child goes without.
        scratch: An empty folder, for the ranks to write into.
    """

    parent: Path
    variant: Path
    pruning: Pruning
    scratch: Path

    @property
    def child(self) -> Path:
        """Where the ranks make the child's checkpoint."""
        return self.scratch / "child"

    @property
    def saved(self) -> Path:
        """Where the ranks save the child that they hold."""
        return self.scratch / "saved"
