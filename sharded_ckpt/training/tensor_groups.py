"""Tensors on their way into a save, grouped by the files that they go to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

from torch import Tensor

from sharded_ckpt.checkpoint.transaction import Transaction

Groups: TypeAlias = "Mapping[str, Mapping[str, Tensor]]"
"""Tensors by the stem of their files, and by name."""


TensorWriter: TypeAlias = "Callable[[Transaction, Groups, int | str | None], None]"
"""Brings tensors into a save, in files of no more than so many bytes."""


def write_groups(save: Transaction, groups: Groups, max_shard_size: int | str | None) -> None:
    """Write tensors into a save, here and now."""
    for stem, tensors in groups.items():
        save.write_tensors(tensors, stem, max_shard_size=max_shard_size)


class Export(Protocol):
    """What is written beside a training state for others."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What this rank writes."""

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Export:
        """Return the same with other memory."""

    def write(self, save: Transaction, write_tensors: TensorWriter, max_shard_size: int | str | None) -> None:
        """Put it into a save."""
