"""Checkpoints with weights in blocks of 8- or 4-bit floats, seen as ordinary ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from patchers.errors import CheckpointError
from sharded_ckpt.loading.quantised import FP8_DTYPES, MXFP4_PARTS, SCALE, Coding, from_fp8
from sharded_ckpt.training.transforms import BaseStateDictAdapter, StateDict


class BlockQuantised(BaseStateDictAdapter):
    """Reads block-quantised weights (`<name>` with `<name>_scale_inv`) as ordinary ones in float32.

    Args:
        block_size: Rows and columns that share a scale, `weight_block_size` in configs; None for one scale.

    Example:
        >>> stored = {"w": torch.ones(3, 2).to(torch.float8_e4m3fn), "w_scale_inv": torch.full((2, 1), 0.5)}
        >>> BlockQuantised((2, 2)).from_hf(stored)["w"].tolist()
        [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """

    def __init__(self, block_size: tuple[int, int] | None = (128, 128)) -> None:
        super().__init__()
        self.block_size = block_size

    def to_hf(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return the names under which the values of a state dict are stored; nothing is quantised here."""
        return {**state_dict, **{name + SCALE: value for name, value in state_dict.items()}}

    def from_hf(self, hf_state_dict: Mapping[str, Any]) -> StateDict:
        """Return the state dict with ordinary weights, and without scales.

        Raises:
            CheckpointError: An 8-bit weight has no scale of this kind, or one that does not fit.
        """
        result: StateDict = {}
        for name, tensor in hf_state_dict.items():
            if tensor.dtype in FP8_DTYPES:
                result[name] = from_fp8(name, tensor, _scale_of(name, hf_state_dict), self.block_size)
            elif not (name.endswith(SCALE) and name.removesuffix(SCALE) in hf_state_dict):
                result[name] = tensor
        return result


class MXFP4Quantised(BaseStateDictAdapter):
    """Reads weights of 4 bits (`<name>_blocks` with `<name>_scales`, as gpt-oss has them) as ordinary ones.

    Example:
        >>> stored = {"w_blocks": torch.full((1, 1, 1, 2), 0x42, dtype=torch.uint8),
        ...           "w_scales": torch.full((1, 1, 1), 128, dtype=torch.uint8)}
        >>> MXFP4Quantised().from_hf(stored)["w"].flatten().tolist()
        [2.0, 4.0, 2.0, 4.0]
    """

    _coding = Coding("mxfp4")

    def to_hf(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return the names under which the values of a state dict are stored; nothing is quantised here."""
        return {name + part: value for name, value in state_dict.items() for part in ("", *MXFP4_PARTS)}

    def from_hf(self, hf_state_dict: Mapping[str, Any]) -> StateDict:
        """Return the state dict with ordinary weights, and without scales.

        Raises:
            CheckpointError: Blocks have no scales, or such as do not fit.
        """
        parts = self._coding.parts(hf_state_dict)
        stored = {name: [hf_state_dict[key] for key in keys] for name, keys in parts.items()}
        return {n: self._coding.decode(n, ts) if len(ts) > 1 else ts[0] for n, ts in stored.items()}


def _scale_of(name: str, state: Mapping[str, Any]) -> torch.Tensor:
    scale: torch.Tensor | None = state.get(name + SCALE)
    if scale is None:
        others = sorted(key for key in state if key.startswith(name) and key != name)
        raise CheckpointError(
            f"{name} is {state[name].dtype} and there is no {name}{SCALE}; found is "
            f"{', '.join(others) or 'nothing'}. Read without its scale the weight would be wrong: dequantise "
            "the checkpoint first"
        )
    return scale
