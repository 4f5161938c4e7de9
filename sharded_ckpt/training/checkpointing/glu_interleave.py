"""Gate and up projections that kernels want interleaved in memory, and files have one after the other.

These are the functions of Megatron-Bridge, over plain tensors and DTensors. `glu_converters` brings them to
`save_checkpoint` and `load_checkpoint`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from patchers.errors import ConfigError
from sharded_ckpt.training.converters import GATE_UP, GLUInterleave
from sharded_ckpt.training.glu import _deinterleave_glu_tensor, _interleave_glu_tensor

_BEFORE: Final = {
    "routed": r"(?:^|\.)(?:local_)?experts(?:\.[^.]+)*",
    "shared": r"(?:^|\.)shared_experts?(?:\.[^.]+)*",
    "dense": r"(?:^|\.)(?:mlp|feed_forward)",
}
"""What stands before the name of the matrix: in routed experts, in shared ones, in an FFN without experts."""


def _is_swiglu_fc1_checkpoint_key(
    key: str,
    *,
    include_routed_experts: bool = True,
    include_shared_experts: bool = False,
    include_dense: bool = True,
) -> bool:
    """Return whether a key is that of a gate and up projection in one matrix, or of its bias.

    Example:
        >>> _is_swiglu_fc1_checkpoint_key("decoder.layers.0.mlp.linear_fc1.weight")
        True
        >>> _is_swiglu_fc1_checkpoint_key("decoder.layers.0.mlp.shared_experts.linear_fc1.weight")
        False
    """
    return re.search(_pattern(include_routed_experts, include_shared_experts, include_dense), key) is not None


def _apply_glu_interleave_to_tensor_data(
    tensor: torch.Tensor, interleave_size: int, interleave: bool
) -> torch.Tensor:
    """Interleave a weight `(2 * width, hidden)` or a bias `(2 * width,)`, or undo it; a DTensor stays one.

    Raises:
        ConfigError: The size does not divide the width, or the tensor holds several experts.
    """
    if tensor.dim() > 2:
        raise ConfigError(
            f"a gate and up projection of shape {tuple(tensor.shape)} holds several experts: interleaving is "
            "for one matrix each"
        )
    change = _interleave_glu_tensor if interleave else _deinterleave_glu_tensor
    if isinstance(tensor, DTensor):
        whole = change(tensor.full_tensor(), interleave_size)
        return distribute_tensor(whole, tensor.device_mesh, tensor.placements)
    return change(tensor, interleave_size)


def _process_state_dict_for_glu_interleaving(
    model_state_dict: Mapping[str, Any],
    interleave_size: int,
    interleave: bool = True,
    use_megatron_fsdp: bool = False,
    include_routed_experts: bool = True,
    include_shared_experts: bool = False,
    include_dense: bool = True,
) -> dict[str, Any]:
    """Return a state dict with its gate and up projections interleaved (to load), or not any more (to save).

    Args:
        model_state_dict: It is not changed.
        interleave_size: How many rows stay together.
        interleave: Which of the two.
        use_megatron_fsdp: Accepted for those who call it so: a DTensor is known by itself.
        include_routed_experts: Whether those of routed experts are meant.
        include_shared_experts: Whether those of shared experts are.
        include_dense: Whether those of an FFN without experts are.
    """
    pattern = _pattern(include_routed_experts, include_shared_experts, include_dense)

    def changed(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or re.search(pattern, name) is None:
            return value
        try:
            return _apply_glu_interleave_to_tensor_data(value, interleave_size, interleave)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None

    return {name: changed(name, model_state_dict[name]) for name in sorted(model_state_dict)}


def _process_state_dict_for_model_glu_interleaving(
    model_state_dict: Mapping[str, Any],
    routed_interleave_size: int | None,
    shared_interleave_size: int | None,
    interleave: bool = True,
    use_megatron_fsdp: bool = False,
) -> dict[str, Any]:
    """Do so for routed experts and FFNs without experts by one size, for shared experts by another."""
    result = dict(model_state_dict)
    for kinds, size in _sized(routed_interleave_size, shared_interleave_size):
        result = _process_state_dict_for_glu_interleaving(
            result, size, interleave, use_megatron_fsdp, **kinds
        )
    return result


def _get_model_glu_interleave_sizes(
    model: Sequence[nn.Module], cfg: Any = None
) -> tuple[int | None, int | None]:
    """Return the sizes for routed experts (and FFNs without experts) and for shared experts; None for none.

    Args:
        model: The parts of the model; the config of each has them as `moe_mlp_glu_interleave_size` and
            `moe_shared_expert_glu_interleave_size`.
        cfg: The config of the run, whose `model` is looked at first.
    """
    configs = [getattr(cfg, "model", None), *(getattr(part, "config", None) for part in model)]

    def first(name: str) -> int | None:
        return next((size for config in configs if (size := getattr(config, name, None)) is not None), None)

    return first("moe_mlp_glu_interleave_size"), first("moe_shared_expert_glu_interleave_size")


def glu_converters(model: Sequence[nn.Module], cfg: Any = None) -> list[GLUInterleave]:
    """Return what a save and a load must undo and do, by the configs of the model; mostly nothing."""
    sizes = _get_model_glu_interleave_sizes(model, cfg)
    return [GLUInterleave(size, _pattern(*kinds.values())) for kinds, size in _sized(*sizes)]


def _sized(routed: int | None, shared: int | None) -> list[tuple[dict[str, bool], int]]:
    names = ("include_routed_experts", "include_shared_experts", "include_dense")
    chosen = [((True, False, True), routed), ((False, True, False), shared)]
    return [(dict(zip(names, kinds, strict=True)), size) for kinds, size in chosen if size is not None]


def _pattern(routed: bool, shared: bool, dense: bool) -> str:
    chosen = {"routed": routed, "shared": shared, "dense": dense}
    before = "|".join(_BEFORE[kind] for kind, wanted in chosen.items() if wanted)
    return rf"(?:{before}){GATE_UP}" if before else r"(?!)"
