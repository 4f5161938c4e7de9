"""How the FFN of a child's block comes out of the parent's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from patchers.base_sizes import BaseSizes
from patchers.block_config import FFNConfig
from patchers.errors import BlockConfigError
from sharded_ckpt.children.choices import Rules, choice_of, kept_units
from sharded_ckpt.children.parent import Part, refuse_from_nothing, refuse_untold
from sharded_ckpt.children.recipes import (
    LargestNorm,
    Recipe,
    Selection,
    Source,
    Units,
    copy_of,
    product,
    take_columns,
    take_rows,
)

_HAVE_ROWS = ("gate", "up")
_HAVE_COLUMNS = ("down",)


def _by_norm(weights: Mapping[str, Source], keep: int) -> Selection:
    rows = tuple(weights[name].key for name in _HAVE_ROWS if name in weights)
    return LargestNorm(rows, tuple(weights[name].key for name in _HAVE_COLUMNS), keep)


def _first(weights: Mapping[str, Source], keep: int) -> Selection:
    return Units(range(keep))


def _product(part: Part) -> list[Recipe]:
    """The FFN without its gate and its activation: `W_down @ W_up`."""
    weights = part.projections()
    return [product(f"{part.name}.linear_mlp.weight", weights["down"], weights["up"])]


FFN_CHANNELS: dict[str, Callable[[Mapping[str, Source], int], Selection]] = {
    "norm": _by_norm,
    "first": _first,
}
"""Rules by which a narrower FFN keeps channels: given the weights by projection, and how many are kept."""

LINEAR_FFN: dict[str, Callable[[Part], list[Recipe]]] = {"product": _product}
"""Rules by which one linear layer takes the place of an FFN."""


def plan_ffn(
    part: Part, had: FFNConfig, wanted: FFNConfig, rules: Rules, index: int, sizes: BaseSizes
) -> list[Recipe]:
    """Return the recipes of one FFN.

    Args:
        part: The parent's.
        had: What the parent's is.
        wanted: What the child's shall be, every size said.
        rules: How.
        index: The block, for choices that are made block by block.
        sizes: What all blocks have alike.

    Raises:
        BlockConfigError: The parent has nothing that this could be made of.
    """
    if wanted == had:
        return [copy_of(source) for source in part.tensors.values()]
    if wanted.no_op:
        return []
    refuse_from_nothing("ffn", "FFN", had, wanted)
    if wanted.replace_with_linear:
        return LINEAR_FFN[rules.linear](part)
    return _narrower(part, had, wanted, rules, index)


def _narrower(part: Part, had: FFNConfig, wanted: FFNConfig, rules: Rules, index: int) -> list[Recipe]:
    if wanted.moe is not None:
        raise BlockConfigError(
            f"ffn.moe asks for experts, and the parent has none there; leave ffn out to keep its {had!r}"
        )
    total, keep = had.intermediate_size or 0, wanted.intermediate_size or 0
    if keep > total:
        raise BlockConfigError(
            f"ffn.intermediate_size={keep} is more than the parent's {total}; a child only leaves out: ask "
            f"for {total} or less"
        )
    weights, biases = part.projections(), part.projections("bias")
    refuse_untold(part, part.others(), "ffn.intermediate_size")
    channels = _selection(weights, total, keep, rules, index)
    recipes: list[Recipe] = []
    for name, source in (*weights.items(), *biases.items()):
        if name in _HAVE_ROWS:
            recipes.append(take_rows(source, channels))
        elif name in _HAVE_COLUMNS and source is weights[name]:
            recipes.append(take_columns(source, channels))
        elif name in _HAVE_COLUMNS:
            recipes.append(copy_of(source))
        else:
            refuse_untold(part, {name: source}, "ffn.intermediate_size")
    return recipes


def _selection(weights: Mapping[str, Source], total: int, keep: int, rules: Rules, index: int) -> Selection:
    change = f"the FFN narrows from {total} to {keep}"
    choice = choice_of(rules.ffn_channels, index, "ffn_channels", change)
    if isinstance(choice, str):
        return FFN_CHANNELS[choice](weights, keep)
    return Units(kept_units(choice, total, keep, "ffn_channels"))
