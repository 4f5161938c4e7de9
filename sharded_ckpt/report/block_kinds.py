"""What the blocks of a checkpoint are, told from the names and shapes of their tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from patchers.base_sizes import BaseSizes, FieldNames
from patchers.block_config import BlockConfig
from patchers.errors import BlockConfigError
from patchers.inference import contradictions, infer_block_configs
from patchers.names import fold_indices
from sharded_ckpt.report.tensor_groups import Numbers, TensorGroup

Kinds: TypeAlias = "dict[int, BlockConfig | None]"
_Tensors: TypeAlias = "frozenset[tuple[int, frozenset[Numbers]]]"


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the config of the language model, which may be nested; None if it does not say its blocks."""
    nested = config.get("text_config")
    told = nested if isinstance(nested, Mapping) else config
    try:
        BaseSizes.of(told)
    except BlockConfigError:
        return None
    return told


def main_stack(groups: Sequence[TensorGroup], config: Mapping[str, Any] | None) -> str | None:
    """Return where the blocks of the language model are: of the lists that are not longer, the largest."""
    layers = math.inf if config is None else BaseSizes.of(config).num_hidden_layers
    nbytes: dict[str, int] = {}
    long = set[str]()
    for group in groups:
        if group.stack is not None:
            nbytes[group.stack] = nbytes.get(group.stack, 0) + group.nbytes
            long |= {group.stack} if max(group.blocks()) >= layers else set()
    return max(nbytes.keys() - long or nbytes, key=lambda stack: (nbytes[stack], stack), default=None)


def infer_kinds(
    stack: str, groups: Sequence[TensorGroup], config: Mapping[str, Any]
) -> tuple[Kinds, list[str]]:
    """Tell what the blocks of the language model are; blocks that are alike are looked at once.

    Args:
        stack: Where they are.
        groups: Their tensors.
        config: Of the model.

    Returns:
        The blocks, also those without any tensor, None where the tensors do not tell; and what is odd.
    """
    layers = BaseSizes.of(config).num_hidden_layers
    alone = {**config, FieldNames.of(config).num_hidden_layers: 1}
    kinds: Kinds = {}
    untold: dict[str, list[int]] = {}
    for tensors, indexes in _alike(groups, layers).items():
        shapes = {
            f"{stack}.0.{groups[at].name_in_block(tail)}": groups[at].shape
            for at, tails in tensors
            for tail in tails
        }
        kind = None
        try:
            (kind,) = infer_block_configs(shapes, alone, layers=stack)
        except BlockConfigError as error:
            text = str(error).removeprefix("block 0: ").replace(f"{stack}.0.", "")
            untold.setdefault(text, []).extend(indexes)
        kinds.update(dict.fromkeys(indexes, kind))
    if beyond := [index for index in kinds if index >= layers]:
        untold[f"beyond the last block: the config says {layers}"] = beyond
    return kinds, _folded(untold) + _contradicted(config, [kinds[index] for index in range(layers)])


def _alike(groups: Sequence[TensorGroup], layers: int) -> dict[_Tensors, list[int]]:
    """Return the blocks that have the same tensors; those without any are there too."""
    blocks: dict[int, set[tuple[int, frozenset[Numbers]]]] = {index: set() for index in range(layers)}
    for at, group in enumerate(groups):
        for index, tails in group.tails().items():
            blocks.setdefault(index, set()).add((at, frozenset(tails)))
    alike: dict[_Tensors, list[int]] = {}
    for index, tensors in sorted(blocks.items()):
        alike.setdefault(frozenset(tensors), []).append(index)
    return alike


def _contradicted(config: Mapping[str, Any], found: Sequence[BlockConfig | None]) -> list[str]:
    """Say where the config says something else of a block than its tensors do."""
    try:
        wrong = contradictions(config, found)
    except BlockConfigError as error:
        return [str(error)]
    alike: dict[str, list[int]] = {}
    for index, (said, is_now) in wrong.items():
        alike.setdefault(f"the config says {said!r}, the tensors {is_now!r}", []).append(index)
    return _folded(alike)


def _folded(texts: Mapping[str, list[int]]) -> list[str]:
    return [f"block{'s'[: len(of) != 1]} {fold_indices(of)}: {text}" for text, of in texts.items()]
