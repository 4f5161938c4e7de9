"""How the attention of a child's block comes out of the parent's.

Query head `i` of `H` attends to KV head `i // (H / K)`, with `K` KV heads. A child has as many query heads as
its parent and fewer KV heads, so each of these serves a larger group of neighbouring query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from patchers.base_sizes import BaseSizes
from patchers.block_config import AttentionConfig
from patchers.errors import BlockConfigError
from sharded_ckpt.children.choices import Rules, choice_of, kept_units
from sharded_ckpt.children.parent import Part, refuse_from_nothing, refuse_untold
from sharded_ckpt.children.recipes import (
    Recipe,
    Source,
    Units,
    copy_of,
    mean_of_heads,
    product,
    take_columns,
    take_rows,
)

# one for all heads; the last is a buffer that only old checkpoints hold
_SHARED_BY_HEADS = ("q_norm.weight", "k_norm.weight", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class Heads:
    """How many heads one attention has.

    Args:
        queries: Query heads, the same in parent and child.
        had: KV heads of the parent.
        keep: KV heads of the child.
        head_dim: Size of a head.
    """

    queries: int
    had: int
    keep: int
    head_dim: int


def _mean(part: Part, heads: Heads) -> list[Recipe]:
    """Neighbouring KV heads become their mean; the queries that attended to any of them attend to it."""
    if heads.had % heads.keep:
        raise BlockConfigError(
            f"kv_heads='mean' cannot make {heads.keep} KV heads of the parent's {heads.had}: groups of "
            "neighbours must be of one size; ask for a divisor, or keep heads by 'first', Indexes or Scores"
        )
    group = heads.had // heads.keep
    return _each_projection(
        part,
        queries=copy_of,
        keys_and_values=lambda source: mean_of_heads(source, group, heads.head_dim),
        outputs=copy_of,
    )


def _first(part: Part, heads: Heads) -> list[Recipe]:
    return _kept(part, heads, range(heads.keep))


def _kept(part: Part, heads: Heads, kept: Sequence[int]) -> list[Recipe]:
    """Some KV heads stay as they are, and with them what their query heads add to the output.

    The query heads of the others have nothing left to attend to. They fill up the groups of those that stay,
    and their columns in `o_proj` become zeros: the child computes what the parent would without those heads,
    and training may take them up again. (PruneKVHeads of NVIDIA Model-Optimizer does the same; there, the
    heads are in the order of their scores.)
    """
    order, idle = regrouped(heads, kept)
    queries = Units(order, heads.head_dim)
    return _each_projection(
        part,
        queries=lambda source: take_rows(source, queries),
        keys_and_values=lambda source: take_rows(source, Units(kept, heads.head_dim)),
        outputs=lambda source: take_columns(source, Units(order, heads.head_dim, idle)),
    )


def _product(part: Part, sizes: BaseSizes, kv_heads: int) -> list[Recipe]:
    """A token's attention to itself alone: `W_o @ W_v`, each head of `W_v` once for each query head on it."""
    weights = part.projections()
    repeat = sizes.need("num_attention_heads") // kv_heads
    key = f"{part.name}.linear_attn.weight"
    return [product(key, weights["o"], weights["v"], repeat, sizes.need("head_dim"))]


KV_HEADS: dict[str, Callable[[Part, Heads], list[Recipe]]] = {"mean": _mean, "first": _first}
"""Rules by which an attention gets fewer KV heads."""

LINEAR_ATTENTION: dict[str, Callable[[Part, BaseSizes, int], list[Recipe]]] = {"product": _product}
"""Rules by which one linear layer takes the place of an attention: given it, the sizes, and its KV heads."""


def plan_attention(
    part: Part,
    had: AttentionConfig,
    wanted: AttentionConfig,
    rules: Rules,
    index: int,
    sizes: BaseSizes,
) -> list[Recipe]:
    """Return the recipes of one attention.

    Args:
        part: The parent's.
        had: What the parent's is.
        wanted: What the child's shall be, every size said.
        rules: How.
        index: The block, for choices that are made block by block.
        sizes: Query heads and their size.

    Raises:
        BlockConfigError: The parent has nothing that this could be made of.
    """
    if wanted == had:
        return [copy_of(source) for source in part.tensors.values()]
    if wanted.no_op:
        return []
    refuse_from_nothing("attention", "attention", had, wanted)
    total = had.num_key_value_heads or 0
    if wanted.replace_with_linear:
        return LINEAR_ATTENTION[rules.linear](part, sizes, total)
    keep = wanted.num_key_value_heads or 0
    if keep > total:
        raise BlockConfigError(
            f"attention.num_key_value_heads={keep} is more than the parent's {total}; a child only leaves "
            f"out: ask for {total} or less"
        )
    heads = Heads(sizes.need("num_attention_heads"), total, keep, sizes.need("head_dim"))
    change = f"the attention goes from {total} KV heads to {keep}"
    choice = choice_of(rules.kv_heads, index, "kv_heads", change)
    if isinstance(choice, str):
        return KV_HEADS[choice](part, heads)
    return _kept(part, heads, kept_units(choice, total, keep, "kv_heads"))


def regrouped(heads: Heads, kept: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the query heads in the child's order, and the places of those whose KV head is gone.

    Args:
        heads: How many there are.
        kept: The KV heads that stay, in the child's order.

    Example:
        >>> regrouped(Heads(queries=8, had=4, keep=2, head_dim=16), kept=(1, 2))
        ((2, 3, 0, 1, 4, 5, 6, 7), (2, 3, 6, 7))
    """
    group, larger = heads.queries // heads.had, heads.queries // heads.keep
    without = iter([head for head in range(heads.queries) if head // group not in kept])
    order: list[int] = []
    idle: list[int] = []
    for kv_head in kept:
        order += range(kv_head * group, (kv_head + 1) * group)
        idle += range(len(order), len(order) + larger - group)
        order += [next(without) for _ in range(larger - group)]
    return tuple(order), tuple(idle)


def _each_projection(
    part: Part,
    queries: Callable[[Source], Recipe],
    keys_and_values: Callable[[Source], Recipe],
    outputs: Callable[[Source], Recipe],
) -> list[Recipe]:
    """Apply a change to every weight and bias of an attention; what heads share stays."""
    weights, biases = part.projections(), part.projections("bias")
    changes = {"q": queries, "k": keys_and_values, "v": keys_and_values, "o": outputs}
    others = part.others()
    unknown = {name: source for name, source in others.items() if name not in _SHARED_BY_HEADS}
    unknown |= {name: source for name, source in weights.items() if name not in changes}
    refuse_untold(part, unknown, "attention.num_key_value_heads")
    recipes = [changes[name](source) for name, source in weights.items()]
    # the bias of the output belongs to no head
    recipes += [(changes[name] if name != "o" else copy_of)(source) for name, source in biases.items()]
    return recipes + [copy_of(source) for source in others.values()]
