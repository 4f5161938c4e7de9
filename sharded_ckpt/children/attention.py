"""How the attention of a child's block comes out of the parent's.

Query head `i` of `H` attends to KV head `i // (H / K)`, with `K` KV heads: each of these serves a group of
neighbouring query heads. A child has fewer of one kind or of both. First it is settled which query heads of
the parent may attend to each KV head of the child; of these, it keeps as many as its groups hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from patchers.base_sizes import BaseSizes
from patchers.block_config import AttentionConfig
from patchers.block_fields import check_groups
from patchers.errors import BlockConfigError
from patchers.names import fold_indices
from sharded_ckpt.children.choices import Rules, Scores, choice_of, kept_units, largest, scores_of
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
        queries: Query heads of the parent.
        had: KV heads of the parent.
        keep: KV heads of the child.
        head_dim: Size of a head.
        left: Query heads of the child; as many as the parent's if not given.
    """

    queries: int
    had: int
    keep: int
    head_dim: int
    left: int = 0

    @property
    def group(self) -> int:
        """Query heads on a KV head of the child."""
        return (self.left or self.queries) // self.keep


@dataclass(frozen=True)
class Fewer:
    """What an attention with fewer KV heads is made of.

    Args:
        keys_and_values: The recipe of their weights and biases.
        groups: The query heads of the parent that may attend to each KV head of the child.
    """

    keys_and_values: Callable[[Source], Recipe]
    groups: tuple[range, ...]


def _mean(heads: Heads) -> Fewer:
    """Neighbouring KV heads become their mean; the queries that attended to any of them attend to it."""
    if heads.had % heads.keep:
        raise BlockConfigError(
            f"kv_heads='mean' cannot make {heads.keep} KV heads of the parent's {heads.had}: groups of "
            "neighbours must be of one size; ask for a divisor, or keep heads by 'first', Indexes or Scores"
        )
    merged = heads.had // heads.keep
    return Fewer(
        lambda source: mean_of_heads(source, merged, heads.head_dim),
        _runs(range(heads.keep), heads.queries // heads.keep),
    )


def _first(heads: Heads) -> Fewer:
    return _kept(heads, range(heads.keep))


def _kept(heads: Heads, kept: Sequence[int]) -> Fewer:
    """Some KV heads stay as they are, and with them what their query heads add to the output."""
    return Fewer(
        lambda source: take_rows(source, Units(kept, heads.head_dim)),
        _runs(kept, heads.queries // heads.had),
    )


def _runs(kept: Sequence[int], length: int) -> tuple[range, ...]:
    return tuple(range(head * length, (head + 1) * length) for head in kept)


def _product(part: Part, had: Heads) -> list[Recipe]:
    """A token's attention to itself alone: `W_o @ W_v`, each head of `W_v` once for each query head on it."""
    weights = part.projections()
    key = f"{part.name}.linear_attn.weight"
    return [product(key, weights["o"], weights["v"], had.queries // had.had, had.head_dim)]


KV_HEADS: dict[str, Callable[[Heads], Fewer]] = {"mean": _mean, "first": _first}
"""Rules by which an attention gets fewer KV heads."""

QUERY_HEADS: dict[str, Callable[[range, int], Sequence[int]]] = {"first": lambda group, keep: group[:keep]}
"""Rules by which a smaller group of query heads is kept: given the group, and how many stay."""

LINEAR_ATTENTION: dict[str, Callable[[Part, Heads], list[Recipe]]] = {"product": _product}
"""Rules by which one linear layer takes the place of an attention: given it and its heads."""


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
    heads = _heads(had, wanted, sizes)
    if wanted.replace_with_linear:
        return LINEAR_ATTENTION[rules.linear](part, heads)
    fewer = _fewer_kv_heads(heads, rules, index)
    groups = _chosen(fewer.groups, heads, rules, index)
    order, idle = filled_up(groups, heads)
    if order == tuple(range(heads.queries)) and not idle:
        return _each_projection(part, copy_of, fewer.keys_and_values, copy_of)
    return _each_projection(
        part,
        queries=lambda source: take_rows(source, Units(order, heads.head_dim)),
        keys_and_values=fewer.keys_and_values,
        outputs=lambda source: take_columns(source, Units(order, heads.head_dim, idle)),
    )


def _heads(had: AttentionConfig, wanted: AttentionConfig, sizes: BaseSizes) -> Heads:
    of_all = sizes.need("num_attention_heads")
    queries, total = had.num_attention_heads or of_all, had.num_key_value_heads or 0
    if not wanted.is_native:
        return Heads(queries, total, total, sizes.need("head_dim"))
    left, keep = wanted.num_attention_heads or of_all, wanted.num_key_value_heads or total
    for name, asked, there in (
        ("num_key_value_heads", keep, total),
        ("num_attention_heads", left, queries),
    ):
        if asked > there:
            raise BlockConfigError(
                f"attention.{name}={asked} is more than the parent's {there}; a child only leaves out: ask "
                f"for {there} or less"
            )
    check_groups(left, keep)
    return Heads(queries, total, keep, sizes.need("head_dim"), left)


def _fewer_kv_heads(heads: Heads, rules: Rules, index: int) -> Fewer:
    if heads.keep == heads.had:
        return Fewer(copy_of, _runs(range(heads.had), heads.queries // heads.had))
    change = f"the attention goes from {heads.had} KV heads to {heads.keep}"
    choice = choice_of(rules.kv_heads, index, "kv_heads", change)
    if isinstance(choice, str):
        return KV_HEADS[choice](heads)
    return _kept(heads, kept_units(choice, heads.had, heads.keep, "kv_heads"))


def _chosen(groups: Sequence[range], heads: Heads, rules: Rules, index: int) -> list[Sequence[int]]:
    """Return the query heads of each group that stay; all of them where the child's groups hold as many."""
    if all(len(group) <= heads.group for group in groups):
        return list(groups)
    change = f"the attention goes from {len(groups[0])} query heads on each KV head to {heads.group}"
    if rules.query_heads is None:
        raise BlockConfigError(
            f"{change}: say which stay by query_heads='first', Scores or Indexes of the parent's query heads"
        )
    choice = choice_of(rules.query_heads, index, "query_heads", change)
    if isinstance(choice, str):
        return [QUERY_HEADS[choice](group, heads.group) for group in groups]
    if isinstance(choice, Scores):
        scores = scores_of(choice, heads.queries, "query_heads")
        best = [largest([scores[head] for head in group], heads.group) for group in groups]
        return [[group[place] for place in places] for group, places in zip(groups, best, strict=True)]
    named = kept_units(choice, heads.queries, heads.left, "query_heads")
    kept: list[Sequence[int]] = [[head for head in named if head in group] for group in groups]
    if any(len(some) != heads.group for some in kept):
        raise BlockConfigError(
            f"query_heads names {', '.join(str(len(some)) for some in kept)} of the query heads on each KV "
            f"head of the child; name {heads.group} of each of {', '.join(map(fold_indices, groups))}"
        )
    return kept


def filled_up(groups: Sequence[Sequence[int]], heads: Heads) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the query heads in the child's order, and the places of those whose KV head is gone.

    Where the child has more query heads than attend to what it keeps, the others have nothing left to attend
    to. They fill up the groups, and their columns in `o_proj` become zeros: the child computes what the
    parent would without those heads, and training may take them up again. (PruneKVHeads of NVIDIA
    Model-Optimizer does the same; there, the heads are in the order of their scores.)

    Args:
        groups: The parent's query heads that attend to each KV head of the child.
        heads: How many there are.

    Example:
        >>> filled_up([(2, 3), (4, 5)], Heads(queries=8, had=4, keep=2, head_dim=16))
        ((2, 3, 0, 1, 4, 5, 6, 7), (2, 3, 6, 7))
    """
    used = {head for group in groups for head in group}
    without = iter([head for head in range(heads.queries) if head not in used])
    order: list[int] = []
    idle: list[int] = []
    for group in groups:
        missing = heads.group - len(group)
        order += group
        idle += range(len(order), len(order) + missing)
        order += [next(without) for _ in range(missing)]
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
    refuse_untold(part, unknown, "the number of heads")
    recipes = [changes[name](source) for name, source in weights.items()]
    # the bias of the output belongs to no head
    recipes += [(changes[name] if name != "o" else copy_of)(source) for name, source in biases.items()]
    return recipes + [copy_of(source) for source in others.values()]
