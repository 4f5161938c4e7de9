"""The model as a strip of blocks: attention above the line, the FFN below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig
from patchers.errors import BlockConfigError
from sharded_ckpt.plots.drawing import (
    ATTENTION,
    EXPERTS,
    FAINT,
    FFN,
    GAP,
    INK,
    LINEAR,
    MIXER,
    TEXT,
    add_legend,
    axes_or_new,
    bare,
    strip_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "attention": ATTENTION,
    "state-space mixer": MIXER,
    "FFN": FFN,
    "experts": EXPERTS,
    "linear": LINEAR,
    "not told": FAINT,
    "removed": GAP,
}
"""Of each kind of part. One that was removed is a gap."""

_ATTENTION_HEIGHT, _FFN_HEIGHT = 0.45, 1.0
_LEAST, _LINEAR = 0.02, 0.15
_APART = 0.12  # of texts at the axis


@dataclass(frozen=True)
class Part:
    """How one part of a block is drawn.

    Attributes:
        kind: One of `COLORS`.
        size: What its height shows: KV heads, or FFN width, of all experts together; None has none.
    """

    kind: str
    size: int | None = None


def attention_part(block: BlockConfig | None) -> Part:
    """Return how the attention of a block is drawn.

    Example:
        >>> attention_part(BlockConfig(AttentionConfig(num_key_value_heads=8)))
        Part(kind='attention', size=8)
    """
    if block is None:
        return Part("not told")
    attention = block.attention
    if attention.mamba is not None:
        return Part("state-space mixer")
    return _replaced(attention) or Part("attention", attention.num_key_value_heads)


def ffn_part(block: BlockConfig | None) -> Part:
    """Return how the FFN of a block is drawn.

    Example:
        >>> ffn_part(BlockConfig(ffn=FFNConfig(no_op=True)))
        Part(kind='removed', size=None)
    """
    if block is None:
        return Part("not told")
    moe = block.ffn.moe
    if moe is None:
        return _replaced(block.ffn) or Part("FFN", block.ffn.intermediate_size)
    experts, width = moe.num_local_experts, moe.expert_intermediate_dim
    shared = moe.shared_expert_intermediate_dim or 0
    return Part("experts", None if experts is None or width is None else experts * width + shared)


def _replaced(part: AttentionConfig | FFNConfig) -> Part | None:
    return Part("removed") if part.no_op else Part("linear") if part.replace_with_linear else None


def plot_blocks(blocks: Sequence[BlockConfig | None], *, ax: Axes | None = None) -> Axes:
    """Draw a model as a strip of blocks, from the first at the left to the last.

    Above the line is the attention, as high as it has KV heads; below it is the FFN, as deep as it is wide
    (of a mixture of experts: all experts together). Colours tell the kinds apart, gaps are parts that
    were removed.

    Args:
        blocks: What each block is, every size said, as `model_blocks` returns them; None where that is not
            known.
        ax: Where to draw; by default new axes of pyplot.

    Returns:
        The axes.

    Raises:
        BlockConfigError: There are no blocks.
        ConfigError: matplotlib is not installed.

    Example:
        >>> from sharded_ckpt.report.model_blocks import model_blocks
        >>> ax = plot_blocks(model_blocks(checkpoint))  # the path of a checkpoint, or a config
        >>> ax.get_xlabel()
        'block'
    """
    if not blocks:
        raise BlockConfigError("there are no blocks to draw")
    ax = axes_or_new(ax, strip_width(len(blocks)), 2.6)
    upper = [attention_part(block) for block in blocks]
    lower = [ffn_part(block) for block in blocks]
    _draw(ax, upper, _ATTENTION_HEIGHT)
    _draw(ax, lower, -_FFN_HEIGHT)
    ax.axhline(0, color=INK, linewidth=0.8)
    ticks = _ticks(upper, _ATTENTION_HEIGHT) | _ticks(lower, -_FFN_HEIGHT)
    ax.set_yticks(list(ticks.values()), list(ticks))
    ax.set_xlim(-0.6, len(blocks) - 0.4)
    ax.set_ylim(-_FFN_HEIGHT * 1.04, _ATTENTION_HEIGHT * 1.08)
    ax.set_xlabel("block", fontsize=TEXT, color=INK)
    bare(ax, "left")
    present = {part.kind for part in (*upper, *lower)}
    add_legend(ax, {kind: color for kind, color in COLORS.items() if kind in present})
    return ax


def _draw(ax: Axes, parts: Sequence[Part], height: float) -> None:
    """Draw the parts on one side of the line."""
    scale = _largest(parts)
    shown = [(at, part) for at, part in enumerate(parts) if part.kind != "removed"]
    heights = [height * _share(part, scale) for _, part in shown]
    ax.bar(
        [at for at, _ in shown],
        heights,
        width=0.86,
        color=[COLORS[part.kind] for _, part in shown],
        linewidth=0,
    )


def _largest(parts: Sequence[Part]) -> int:
    return max((part.size for part in parts if part.size is not None), default=1)


def _share(part: Part, largest: int) -> float:
    """Return how high a part is, of the highest one."""
    if part.size is not None:
        return max(_LEAST, part.size / largest)
    return _LINEAR if part.kind == "linear" else 1.0


def _ticks(parts: Sequence[Part], height: float) -> dict[str, float]:
    """Name sizes where their bars end: all of few where there is room, else the largest and its half."""
    sizes = sorted({part.size for part in parts if part.size is not None}, reverse=True)
    if not sizes:
        return {}
    largest = sizes[0]
    ends = dict[str, float]()
    for size in sizes if len(sizes) <= 3 else (largest, largest // 2):
        end = height * size / largest
        if all(abs(end - other) >= _APART for other in ends.values()):
            ends[_size_text(size, height > 0)] = end
    return ends


def _size_text(size: int, is_attention: bool) -> str:
    unit = f"KV head{'s'[: size != 1]}" if is_attention else "wide"
    return f"{size:,} {unit}".replace(",", " ")
