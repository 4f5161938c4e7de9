"""What the demo's child goes without: whole sub-blocks, and half the width of some FFNs."""

from __future__ import annotations

from dataclasses import dataclass

from patchers.block_config import BlockConfig, FFNConfig

from .variant import Dropped, blocks_text


@dataclass(frozen=True)
class Pruning:
    """What a model goes without, compared with its parent.

    Attributes:
        dropped: The sub-blocks that are gone.
        half_ffn: Blocks whose FFN has half the channels: those that add the most in the parent.

    Example:
        >>> str(Pruning(Dropped(attention=(15, 17)), half_ffn=(13, 14)))
        'without the attention of blocks 15,17, with half the FFN of blocks 13-14'
    """

    dropped: Dropped
    half_ffn: tuple[int, ...] = ()

    def __str__(self) -> str:
        gone = f"without {self.dropped}" if str(self.dropped) else ""
        half = f"with half the FFN of {blocks_text(self.half_ffn)}" if self.half_ffn else ""
        return ", ".join(part for part in (gone, half) if part)

    def block_configs(self, intermediate_size: int) -> dict[int, BlockConfig]:
        """Return the blocks that differ from the parent's, as `init_child_from_parent` takes them.

        Args:
            intermediate_size: Of the parent's FFNs.

        Example:
            >>> Pruning(Dropped(), half_ffn=(3,)).block_configs(256)[3].ffn.intermediate_size
            128
        """
        changed = {*self.dropped.attention, *self.dropped.ffn, *self.half_ffn}
        return {index: self._block(index, intermediate_size // 2) for index in sorted(changed)}

    def _block(self, index: int, half: int) -> BlockConfig:
        dropped = self.dropped.block(index)
        ffn = FFNConfig(intermediate_size=half) if index in self.half_ffn else dropped.ffn
        return BlockConfig(dropped.attention, ffn)
