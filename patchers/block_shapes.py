"""The sizes of one block, from the shapes of its weights: `(out, in)`, as `torch.nn.Linear` keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from patchers.base_sizes import BaseSizes
from patchers.block_config import AttentionConfig, FFNConfig, MoEConfig
from patchers.errors import BlockConfigError
from patchers.names import fold_indices
from patchers.tensor_roles import TensorRole

Tensor = tuple[str, tuple[int, ...]]
"""A full tensor name and its shape."""


def infer_attention(weights: Mapping[str, Tensor], base: BaseSizes) -> AttentionConfig:
    """Return what the attention weights of a block say, by projection: q, k, v, o; or qkv, o; or linear.

    Raises:
        BlockConfigError: A projection is missing, or shapes contradict each other or the base config.
    """
    hidden = base.need("hidden_size")
    if "linear" in weights:
        _check_linear(weights, hidden)
        return AttentionConfig(replace_with_linear=True)
    fused = "qkv" in weights
    _need(weights, ("qkv", "o") if fused else ("q", "k", "v", "o"), "attention")
    of_all, head_dim = base.need("num_attention_heads"), base.need("head_dim")
    heads = _query_heads(weights, base)
    if fused:
        per_head, kv = 2 * head_dim, [weights["qkv"]]
        rows = _rows(weights["qkv"], hidden) - heads * head_dim
    else:
        per_head, kv = head_dim, [weights["k"], weights["v"]]
        rows = _agreed({tensor: _rows(tensor, hidden) for tensor in kv}, "KV rows")
    said = None if heads == of_all else heads
    return AttentionConfig(_kv_heads(rows, per_head, heads, kv, base), num_attention_heads=said)


def infer_ffn(weights: Mapping[str, Tensor], base: BaseSizes) -> FFNConfig:
    """Return what the weights of a dense FFN say, by projection: gate, up, down; or gate_up, down; or linear.

    Raises:
        BlockConfigError: A projection is missing, or shapes contradict each other or the base config.
    """
    hidden = base.need("hidden_size")
    if "linear" in weights:
        _check_linear(weights, hidden)
        return FFNConfig(replace_with_linear=True)
    return FFNConfig(_width(weights, hidden, "FFN"))


def infer_experts(parts: Mapping[str, Mapping[TensorRole, Tensor]], base: BaseSizes) -> FFNConfig:
    """Return what the weights of a mixture of experts say: those of experts, shared expert and router.

    Raises:
        BlockConfigError: An expert or a projection is missing, or shapes contradict each other.
    """
    hidden = base.need("hidden_size")
    experts, router = parts.get("experts", {}), list(parts.get("router", {}).values())
    if not experts:
        found = [tensor for part in parts.values() for tensor in part.values()]
        raise BlockConfigError(f"{shown(found)} belong to experts, but there are no experts")
    stacked = any(role.expert is None for role in experts)
    count, width = _stacked_experts(experts, hidden) if stacked else _listed_experts(experts, hidden)
    for tensor in router:
        if _rows(tensor, hidden) != count:
            raise BlockConfigError(
                f"{shown([tensor])} routes to {tensor[1][0]} experts, but there are {count}"
            )
    shared = {role.projection: tensor for role, tensor in parts.get("shared", {}).items()}
    shared_width = _width(shared, hidden, "shared expert") if shared else 0
    visited = base.moe.num_experts_per_tok if base.moe is not None else None
    return FFNConfig(moe=MoEConfig(count, visited, width, shared_width))


def shown(tensors: Iterable[Tensor], limit: int = 6) -> str:
    """Show tensors with their shapes in one line."""
    listed = [f"{key} {shape}" for key, shape in tensors]
    return ", ".join(listed[:limit] + ([f"and {len(listed) - limit} more"] if len(listed) > limit else []))


def _stacked_experts(experts: Mapping[TensorRole, Tensor], hidden: int) -> tuple[int, int]:
    for tensor in experts.values():
        if len(tensor[1]) != 3:
            raise BlockConfigError(
                f"{shown([tensor])}: stacked experts have three dimensions, the experts first"
            )
    count = _agreed({tensor: tensor[1][0] for tensor in experts.values()}, "experts")
    # Families disagree on (experts, out, in) and (experts, in, out): the side that is not hidden is the
    # width.
    return count, _width({role.projection: tensor for role, tensor in experts.items()}, hidden, "experts")


def _listed_experts(experts: Mapping[TensorRole, Tensor], hidden: int) -> tuple[int, int]:
    by_expert: dict[int, dict[str, Tensor]] = {}
    for role, tensor in experts.items():
        by_expert.setdefault(role.expert or 0, {})[role.projection] = tensor
    missing = set(range(max(by_expert) + 1)) - set(by_expert)
    if missing:
        some = next(iter(experts.values()))[0]
        raise BlockConfigError(f"experts {fold_indices(missing)} are missing beside {some}")
    widths = {}
    for expert, weights in by_expert.items():
        widths[next(iter(weights.values()))] = _width(weights, hidden, f"expert {expert}")
    return len(by_expert), _agreed(widths, "expert widths")


def _width(weights: Mapping[str, Tensor], hidden: int, part: str) -> int:
    """The width that all weights of one FFN agree on."""
    _need(weights, ("gate_up", "down") if "gate_up" in weights else ("up", "down"), part)
    widths = {}
    for projection, tensor in weights.items():
        width = _columns(tensor, hidden) if projection == "down" else _rows(tensor, hidden)
        if projection == "gate_up":
            if width % 2:
                raise BlockConfigError(f"{shown([tensor])} holds gate and up, but {width} rows are not even")
            width //= 2
        widths[tensor] = width
    return _agreed(widths, "FFN widths")


def _agreed(values: Mapping[Tensor, int], what: str) -> int:
    if len(set(values.values())) > 1:
        said = ", ".join(f"{shown([tensor])} says {value}" for tensor, value in values.items())
        raise BlockConfigError(f"{what} contradict each other: {said}")
    return next(iter(values.values()))


def _query_heads(weights: Mapping[str, Tensor], base: BaseSizes) -> int:
    hidden, head_dim = base.need("hidden_size"), base.need("head_dim")
    columns = _columns(weights["o"], hidden)
    # Some families (qwen3_next) keep an output gate in the rows of q, too.
    gated = _rows(weights["q"], hidden) in (columns, 2 * columns) if "q" in weights else True
    if columns % head_dim or not gated:
        found = shown([weights[name] for name in ("q", "o") if name in weights])
        raise BlockConfigError(
            f"{found}: no number of query heads of head_dim={head_dim} has these rows and columns; head_dim "
            "of the config must hold for all blocks"
        )
    return columns // head_dim


def _kv_heads(rows: int, rows_per_head: int, heads: int, tensors: Iterable[Tensor], base: BaseSizes) -> int:
    if rows <= 0 or rows % rows_per_head or heads % (rows // rows_per_head):
        raise BlockConfigError(
            f"{shown(tensors)}: no number of KV heads of head_dim={base.head_dim} that divides "
            f"{base.names.num_attention_heads}={heads} has these rows; is head_dim right?"
        )
    return rows // rows_per_head


def _check_linear(weights: Mapping[str, Tensor], hidden: int) -> None:
    if len(weights) > 1:
        raise BlockConfigError(
            f"a linear replacement beside the part that it replaces: {shown(weights.values())}"
        )
    if weights["linear"][1] != (hidden, hidden):
        raise BlockConfigError(f"{shown([weights['linear']])}: a linear replacement is ({hidden}, {hidden})")


def _need(weights: Mapping[str, Tensor], projections: tuple[str, ...], part: str) -> None:
    if missing := [name for name in projections if name not in weights]:
        raise BlockConfigError(
            f"{part} without {', '.join(missing)}: there is only {shown(weights.values())}; are the tensors "
            "of all files given?"
        )


def _rows(tensor: Tensor, hidden: int) -> int:
    """The output size of a weight whose input is the hidden states."""
    return _other_side(tensor, hidden, hidden_at=1)


def _columns(tensor: Tensor, hidden: int) -> int:
    """The input size of a weight whose output is the hidden states."""
    return _other_side(tensor, hidden, hidden_at=0)


def _other_side(tensor: Tensor, hidden: int, hidden_at: int) -> int:
    key, shape = tensor
    # gpt2's Conv1D (c_attn, c_fc, c_proj) and stacked experts may come transposed; a Linear never does.
    may_be_transposed = len(shape) == 3 or ".c_" in key
    sides = shape[-2:] if len(shape) in (2, 3) else ()
    if len(sides) == 2 and sides[hidden_at] == hidden:
        return sides[1 - hidden_at]
    if len(sides) == 2 and may_be_transposed and sides[1 - hidden_at] == hidden:
        return sides[hidden_at]
    expected = f"(…, {hidden})" if hidden_at else f"({hidden}, …)"
    raise BlockConfigError(f"{shown([tensor])}: expected {expected} at hidden_size={hidden}")
