"""Tensor names: which block a name belongs to, and how a list of names is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
_OTHER_TOWER = re.compile(r"(?:^|\.)(?:visual|vision|audio|image)\w*\.")
_BLOCK = re.compile(r"^(?P<prefix>.*?(?:layers|h|blocks|block))\.(?P<index>\d+)\.")
_PLACE = re.compile(r"^((?:.*?\.)?(?:layers|h|blocks|block))\.(\d+)\.(.+)$")


def block_of(key: str) -> int | None:
    """Return the index of the block that a tensor name belongs to, or None for names outside the blocks.

    This is a guess from the name alone, good enough to show a checkpoint and to start reading ahead; what is
    loaded is decided by the model itself. The layers of a vision or audio tower are no blocks.

    Example:
        >>> block_of("model.layers.12.mlp.up_proj.weight"), block_of("lm_head.weight")
        (12, None)
    """
    match = None if _OTHER_TOWER.search(key) else _BLOCK.match(key)
    return int(match["index"]) if match else None


def split_block(key: str) -> tuple[str, int, str] | None:
    """Split the name of a block's tensor into where the blocks are, the block, and the name within the block.

    Example:
        >>> split_block("model.layers.12.mlp.up_proj.weight"), split_block("lm_head.weight")
        (('model.layers', 12, 'mlp.up_proj.weight'), None)
    """
    match = _PLACE.match(key)
    if match is None:
        return None
    stack, index, name = match.groups()
    return stack, int(index), name


def fold(keys: Iterable[str], limit: int = 12) -> str:
    """Show tensor names in one line, with the first index that varies folded into ranges.

    Args:
        keys: Tensor names.
        limit: How many folded names to show; the rest is counted.

    Example:
        >>> fold(f"model.layers.{i}.mlp.up_proj.weight" for i in (3, 7, 8, 9))
        'model.layers.{3,7-9}.mlp.up_proj.weight'
    """
    groups: dict[tuple[str, str], set[int]] = {}
    for key in keys:
        match = _INDEX.search(key)
        shape = (key[: match.start()], key[match.end() :]) if match else (key, "")
        groups.setdefault(shape, set()).update([int(match[0])] if match else [])
    names = [head + _braces(indices) + tail for (head, tail), indices in sorted(groups.items())]
    shown = names[:limit] + ([f"and {len(names) - limit} more"] if len(names) > limit else [])
    return ", ".join(shown)


def fold_indices(indices: Iterable[int]) -> str:
    """Show integers as ranges.

    Example:
        >>> fold_indices([3, 7, 8, 9])
        '3,7-9'
    """
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _braces(indices: set[int]) -> str:
    if not indices:
        return ""
    text = fold_indices(indices)
    return text if len(indices) == 1 else "{" + text + "}"
