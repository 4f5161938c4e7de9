"""What a tensor of a decoder block is, told from its name by the conventions that families share."""

from __future__ import annotations

from dataclasses import dataclass

_ATTENTION = {
    "q": ("q_proj", "query", "wq"),
    "k": ("k_proj", "key", "wk"),
    "v": ("v_proj", "value", "wv"),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "wo"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv"),
    "linear": ("linear_attn",),
}
_FFN = {
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "fc1", "c_fc", "dense_h_to_4h", "fc_in"),
    "down": ("down_proj", "w2", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "output_linear"),
    "gate_up": ("gate_up_proj", "input_linear"),
    "linear": ("linear_mlp",),
}
_STACKED = frozenset(
    {"input_linear", "output_linear"}
)  # granitemoe: all experts in one, with no module of theirs
_ROUTERS = frozenset({"gate", "router", "wg"})
# Names that are a projection of attention under whatever module: nemotron_h calls every kind of mixer
# `mixer`.
_ALWAYS_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"})

_ATTENTION_OF = {name: projection for projection, names in _ATTENTION.items() for name in names}
_FFN_OF = {name: projection for projection, names in _FFN.items() for name in names}


@dataclass(frozen=True)
class TensorRole:
    """What a weight does in its block.

    Args:
        part: `"attention"`, `"ffn"` (dense), `"experts"`, `"shared"` (the expert that every token visits) or
            `"router"`.
        projection: Which of the part's weights: `"k"`, `"gate_up"`, `"linear"`, …
        expert: The index of the expert, where each has tensors of its own; None where they are stacked in
            one.
    """

    part: str
    projection: str
    expert: int | None = None


def role_of(name: str) -> TensorRole | None:
    """Return the role of a tensor by its name within the block, or None if the name does not tell.

    Example:
        >>> role_of("self_attn.k_proj.weight")
        TensorRole(part='attention', projection='k', expert=None)
        >>> role_of("mlp.experts.7.down_proj.weight")
        TensorRole(part='experts', projection='down', expert=7)
    """
    *owners, last = name.removesuffix(".weight").split(".")
    if last in _ALWAYS_ATTENTION or any("attn" in owner or "attention" in owner for owner in owners):
        projection = _ATTENTION_OF.get(last)
        return TensorRole("attention", projection) if projection else None
    projection = _FFN_OF.get(last)
    if "block_sparse_moe" in owners and last in _STACKED:
        return TensorRole("experts", _FFN_OF[last])
    if "experts" in owners:
        inner = owners[owners.index("experts") + 1 :]
        expert = int(inner[0]) if inner and inner[0].isdecimal() else None
        return TensorRole("experts", projection, expert) if projection else None
    if any(owner.startswith("shared_expert") or owner == "shared_mlp" for owner in owners):
        return TensorRole("shared", projection) if projection else None
    if last in _ROUTERS and owners:
        return TensorRole("router", last)
    return TensorRole("ffn", projection) if projection else None
