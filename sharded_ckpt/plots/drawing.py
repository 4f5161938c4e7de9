"""What all pictures share: where they are drawn, and in which colours."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from patchers.errors import ConfigError
from patchers.tables import amount

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PALE, FAINT = "#333333", "#9a9a9a", "#e6e6e6"
"""Text and lines, what matters less, what is only there to be compared with."""

ATTENTION, FFN, EXPERTS, LINEAR, MIXER = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9"
"""From the palette of Okabe and Ito, which colour-blind readers can tell apart
(https://jfly.uni-koeln.de/color/)."""

GAP = "white"
"""Where something was and is no more."""

TEXT = 9.0
"""Size of the text, in points."""


def require_matplotlib() -> None:
    """Check that pictures can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "pictures are drawn with matplotlib, which is not installed: python -m pip install matplotlib, "
            'or "sharded-ckpt[plots]"'
        )


def new_figure(width: float, height: float) -> Figure:
    """Make a figure that nobody but its user keeps.

    Args:
        width: In inches.
        height: In inches.
    """
    require_matplotlib()
    from sharded_ckpt.plots.picture import Picture

    return Picture(figsize=(width, height), layout="constrained")


def axes_or_new(ax: Axes | None, width: float, height: float) -> Axes:
    """Return the axes that were given, or pyplot's new ones, which a notebook shows by itself."""
    if ax is not None:
        return ax
    require_matplotlib()
    from matplotlib import pyplot

    made: Axes = pyplot.subplots(figsize=(width, height), layout="constrained")[1]
    return made


def strip_width(num_blocks: int) -> float:
    """Return the width, in inches, of a picture with all blocks beside each other."""
    return min(14.0, 5.0 + 0.08 * num_blocks)


def bare(ax: Axes, *keep: str) -> None:
    """Take away the frame but for some sides, and make the text small."""
    for side, spine in ax.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(PALE)
    ax.tick_params(labelsize=TEXT - 1, colors=INK, length=2.5)


def rank_colors(world_size: int) -> list[str]:
    """Return a colour for each rank: from dark to light, as even for colour-blind eyes and in grey."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shades = colormaps["cividis"]
    return [to_hex(shades(0.08 + 0.84 * rank / max(1, world_size - 1))) for rank in range(world_size)]


def text_on(color: str) -> str:
    """Return black or white, whichever can be read on a colour."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(color)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def add_legend(ax: Axes, colors: Mapping[str, str]) -> None:
    """Say above the picture what the colours are."""
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=color, edgecolor=PALE if color == GAP else "none", linewidth=0.6, label=name)
        for name, color in colors.items()
    ]
    ax.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(handles),
        frameon=False,
        fontsize=TEXT - 1,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def halo() -> list[Any]:
    """Return what keeps a text readable where a line crosses it."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2, foreground="white")]


def axis_text(value: float, by: str) -> str:
    """Show a cost at an axis, without decimals that say nothing.

    Example:
        >>> axis_text(120e9, "bytes"), axis_text(2.5e9, "bytes"), axis_text(0, "bytes")
        ('120 GB', '2.5 GB', '0')
    """
    number, _, unit = amount(value, by).partition(" ")
    return f"{float(number):g} {unit}".rstrip() if value else "0"


def title(ax: Axes, text: str) -> None:
    """Say at the left, above the picture, what it is."""
    ax.set_title(text, loc="left", fontsize=TEXT + 1, color=INK)
