"""What a child must hold, worked out by hand: whole tensors in memory, no part of the code under test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def largest_channels(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, keep: int) -> torch.Tensor:
    """The channels of the largest weights, ascending."""
    scores = gate.float().square().sum(1) + up.float().square().sum(1) + down.float().square().sum(0)
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def narrowed(tensors: Tensors, prefix: str, channels: torch.Tensor) -> Tensors:
    """An FFN that keeps some channels."""
    part = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        part[f"{prefix}.{name}.weight"] = tensors[f"{prefix}.{name}.weight"]
        part[f"{prefix}.{name}.weight"] = part[f"{prefix}.{name}.weight"].index_select(
            int(name == "down_proj"), channels
        )
        if f"{prefix}.{name}.bias" in tensors:
            bias = tensors[f"{prefix}.{name}.bias"]
            part[f"{prefix}.{name}.bias"] = bias if name == "down_proj" else bias[channels]
    return part


def mean_heads(tensor: torch.Tensor, keep: int, head_dim: int) -> torch.Tensor:
    """Means of neighbouring heads."""
    heads = tensor.float().view(keep, -1, head_dim, *tensor.shape[1:])
    return heads.mean(1).flatten(0, 1).to(tensor.dtype)


def averaged(tensors: Tensors, prefix: str, keep: int, head_dim: int) -> Tensors:
    """An attention whose KV heads are means of neighbours."""
    part = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
    for name in part:
        if ".k_proj." in name or ".v_proj." in name:
            part[name] = mean_heads(part[name], keep, head_dim)
    return part


def kept(tensors: Tensors, prefix: str, heads: int, head_dim: int, keep: Sequence[int]) -> Tensors:
    """An attention that keeps some KV heads, put together head by head."""
    part = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
    had = part[f"{prefix}.k_proj.weight"].shape[0] // head_dim
    group, larger = heads // had, heads // len(keep)
    spare = [head for head in range(heads) if head // group not in keep]
    order: list[tuple[int, bool]] = []
    for kv_head in keep:
        order += [(kv_head * group + i, True) for i in range(group)]
        order += [(spare.pop(0), False) for _ in range(larger - group)]
    for name, tensor in part.items():
        if ".k_proj." in name or ".v_proj." in name:
            part[name] = torch.cat([tensor[h * head_dim : (h + 1) * head_dim] for h in keep])
        elif ".q_proj." in name:
            part[name] = torch.cat([tensor[h * head_dim : (h + 1) * head_dim] for h, _ in order])
        elif name.endswith(".o_proj.weight"):
            columns = [(tensor[:, h * head_dim : (h + 1) * head_dim], used) for h, used in order]
            part[name] = torch.cat([c if used else torch.zeros_like(c) for c, used in columns], dim=1)
    return part


def linear_attention(tensors: Tensors, prefix: str, heads: int, head_dim: int) -> Tensors:
    """The attention of a token to itself."""
    o, v = tensors[f"{prefix}.o_proj.weight"], tensors[f"{prefix}.v_proj.weight"]
    values = v.float().view(-1, head_dim, v.shape[1])
    expanded = values.repeat_interleave(heads // len(values), 0).flatten(0, 1)
    return {f"{prefix}.linear_attn.weight": (o.float() @ expanded).to(o.dtype)}


def linear_ffn(tensors: Tensors, prefix: str) -> Tensors:
    """An FFN without gate and activation."""
    down, up = tensors[f"{prefix}.down_proj.weight"], tensors[f"{prefix}.up_proj.weight"]
    return {f"{prefix}.linear_mlp.weight": (down.float() @ up.float()).to(down.dtype)}


def without(tensors: Tensors, *prefixes: str) -> Tensors:
    """All tensors but those of some modules."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(tuple(f"{prefix}." for prefix in prefixes))
    }


def assert_equal(found: Tensors, expected: Tensors) -> None:
    """Same names, dtypes, shapes and bits."""
    assert sorted(found) == sorted(expected)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def blocks_said(config: dict[str, Any], part: str, field: str) -> list[Any]:
    """What a field of each block's part is in a config.json."""
    return [block[part][field] for block in config["block_configs"]]
