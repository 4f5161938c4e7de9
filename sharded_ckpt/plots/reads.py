"""Which bytes of which file each rank reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchers.errors import CheckpointError
from patchers.tables import amount
from sharded_ckpt.plots.drawing import FAINT, INK, TEXT, axes_or_new, axis_text, bare, rank_colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sharded_ckpt.report.file_reads import FileReads

_NAMES_UP_TO = 40  # files; of more, only some are named
_RANKS_UP_TO = 15  # in the legend; colours are in their order


def plot_reads(files: Sequence[FileReads], *, rank: int | None = None, ax: Axes | None = None) -> Axes:
    """Draw the files of a checkpoint, one below the other, and which bytes of them are read.

    Args:
        files: As `file_reads` returns them.
        rank: Show what this rank reads; by default what all of them read, each in its own colour.
        ax: Where to draw; by default new axes of pyplot.

    Returns:
        The axes.

    Raises:
        CheckpointError: There are no files, or there is no such rank.
        ConfigError: matplotlib is not installed.

    Example:
        >>> from sharded_ckpt import plan_ownership
        >>> from sharded_ckpt.report.file_reads import file_reads
        >>> ax = plot_reads(file_reads(checkpoint, plan_ownership(checkpoint, 2)))
        >>> ax.get_xlabel()
        'offset in the file'
    """
    if not files:
        raise CheckpointError("there are no files to draw")
    world_size = len(files[0].ranges)
    if rank is not None and not 0 <= rank < world_size:
        raise CheckpointError(f"there is no rank {rank}: the plan is of {world_size}")
    ax = axes_or_new(ax, 8.0, 1.4 + 0.22 * min(len(files), 40))
    rows = range(len(files))
    ax.barh(rows, [file.nbytes for file in files], height=0.72, color=FAINT, linewidth=0)
    colors = rank_colors(world_size)
    for reader in range(world_size) if rank is None else [rank]:
        _bars(ax, files, reader, colors[reader])
    step = -(-len(files) // _NAMES_UP_TO)
    ax.set_yticks(rows[::step], [file.name for file in files][::step])
    ax.set_ylim(len(files) - 0.4, -0.6)
    ax.xaxis.set_major_formatter(lambda value, _: axis_text(value, "bytes"))
    ax.set_xlabel("offset in the file", fontsize=TEXT, color=INK)
    bare(ax, "bottom")
    _legend(ax, files, colors, rank)
    return ax


def _bars(ax: Axes, files: Sequence[FileReads], rank: int, color: str) -> None:
    for row, file in enumerate(files):
        spans = [(begin, end - begin) for begin, end in file.ranges[rank]]
        ax.broken_barh(spans, (row - 0.36, 0.72), facecolor=color, edgecolor="white", linewidth=0.4)


def _legend(ax: Axes, files: Sequence[FileReads], colors: Sequence[str], rank: int | None) -> None:
    from matplotlib.patches import Patch

    step = -(-len(colors) // _RANKS_UP_TO)
    shown = range(0, len(colors), step) if rank is None else [rank]
    handles = [
        Patch(facecolor=colors[at], label=f"rank {at}: {amount(_read(files, at), 'bytes')}") for at in shown
    ]
    handles.append(Patch(facecolor=FAINT, label="header" if rank is None else "not read"))
    ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=min(len(handles), 4),
        frameon=False,
        fontsize=TEXT - 1,
        labelcolor=INK,
        handlelength=1.0,
        columnspacing=1.2,
    )


def _read(files: Sequence[FileReads], rank: int) -> int:
    return sum(end - begin for file in files for begin, end in file.ranges[rank])
