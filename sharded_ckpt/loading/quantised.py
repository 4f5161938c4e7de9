"""Checkpoints whose weights are stored in 8 or 4 bits with scales beside them: what they say, exactly.

Two codings are read, both into ordinary floating-point numbers:

- `fp8` (DeepSeek-V3 and many after it): `X.weight` in float8 and `X.weight_scale_inv`, one scale for each
  block of `weight_block_size` elements, or one for all. Blocks at the edges may be cut off: that is why the
  block size of the config counts, never the quotient of the shapes.
- `mxfp4` (gpt-oss): `X_blocks` of two 4-bit numbers (E2M1) a byte, 16 bytes a block, and `X_scales`, the
  exponent of each block, biased by 127 (OCP Microscaling Formats, version 1.0).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt.ownership.counting import DEQUANTISED

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE = "_scale_inv"
_ACTIVATION_SCALE = ".activation_scale"
MXFP4_PARTS = _BLOCKS, _SCALES = "_blocks", "_scales"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Coding:
    """How the weights of a checkpoint are quantised.

    Attributes:
        method: `fp8` or `mxfp4`.
        block: Rows and columns that share a scale; None where a tensor has one scale.
    """

    method: str
    block: tuple[int, int] | None = None

    @classmethod
    def of(cls, quantization_config: Any) -> Coding | None:
        """Read a config's `quantization_config`; None if there is none.

        Raises:
            ConfigError: It names a method that is not read.
        """
        if quantization_config is None:
            return None
        said = quantization_config
        raw: Mapping[str, Any] = said if isinstance(said, Mapping) else said.to_dict()
        method = raw.get("quant_method")
        method = getattr(method, "value", method)
        if method not in DEQUANTISED:
            raise ConfigError(
                f"quantization_config says quant_method={method!r}: fp8 (float8 weights with "
                "weight_scale_inv) and mxfp4 are dequantised while they are loaded, other methods are not. "
                "Dequantise the checkpoint first, with the library that wrote it"
            )
        block = raw.get("weight_block_size") if method == "fp8" else None
        return cls(method, None if block is None else (int(block[0]), int(block[1])))

    def parts(self, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the logical tensors of a checkpoint, each with the keys that it is stored under.

        Example:
            >>> Coding("fp8").parts(["a.weight", "a.weight_scale_inv", "norm.weight"])
            {'a.weight': ('a.weight', 'a.weight_scale_inv'), 'norm.weight': ('norm.weight',)}
        """
        known = dict.fromkeys(keys)
        return dict(self._fp8_parts(known) if self.method == "fp8" else self._mxfp4_parts(known))

    def _fp8_parts(self, keys: Mapping[str, None]) -> Iterable[tuple[str, tuple[str, ...]]]:
        for key in keys:
            if key.endswith(SCALE) and key.removesuffix(SCALE) in keys:
                continue
            if key.endswith(_ACTIVATION_SCALE):  # of inputs that would be quantised: here they are not
                continue
            yield key, (key, key + SCALE) if key + SCALE in keys else (key,)

    def _mxfp4_parts(self, keys: Mapping[str, None]) -> Iterable[tuple[str, tuple[str, ...]]]:
        for key in keys:
            name = key.removesuffix(_BLOCKS)
            if key.endswith(_BLOCKS) and name + _SCALES in keys:
                yield name, (key, name + _SCALES)
            elif not (key.endswith(_SCALES) and key.removesuffix(_SCALES) + _BLOCKS in keys):
                yield key, (key,)

    def decode(self, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what the stored parts of a tensor say, in float32.

        Args:
            name: The logical tensor, for errors.
            parts: Its stored tensors, in the order in which `parts` names their keys.

        Raises:
            CheckpointError: The parts do not fit each other.
        """
        weight, scale = parts
        if self.method == "mxfp4":
            return from_mxfp4(name, weight, scale)
        return from_fp8(name, weight, scale, self.block)


def take_coding(config: PreTrainedConfig) -> Coding | None:
    """Return how a config says the weights are quantised, and let it forget: what is loaded is not.

    Raises:
        ConfigError: It names a method that is not read.
    """
    configs = (config, config.get_text_config(decoder=True))
    said = [vars(part).pop("quantization_config", None) for part in configs]
    return Coding.of(next((one for one in said if one is not None), None))


def from_fp8(
    name: str, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None
) -> torch.Tensor:
    """Multiply float8 weights with their scales.

    Args:
        name: The tensor, for errors.
        weight: `(…, out, in)`.
        scale: `(…, ceil(out / block[0]), ceil(in / block[1]))`, or one number. Bytes are exponents of two,
            biased by 127, as those of float8_e8m0fnu are.
        block: Rows and columns that share a scale.

    Returns:
        Float32, `(…, out, in)`.

    Raises:
        CheckpointError: The weights are no float8 numbers, or the scales do not fit them.
    """
    if weight.dtype not in FP8_DTYPES:
        raise CheckpointError(
            f"{name} has a {SCALE.strip('_')} and is {weight.dtype}: only float8 weights are dequantised"
        )
    factors = _powers_of_two(scale) if scale.dtype == torch.uint8 else scale.float()
    if factors.numel() == 1:
        return weight.float() * factors.reshape(())
    rows, columns = weight.shape[-2:]
    size = block or (rows, columns)
    expected = (*weight.shape[:-2], -(-rows // size[0]), -(-columns // size[1]))
    if factors.shape != expected:
        raise CheckpointError(
            f"{name}{SCALE} has shape {tuple(scale.shape)}; weights of shape {tuple(weight.shape)} in blocks "
            f"of {size[0]} x {size[1]} (weight_block_size in the config) have scales of shape {expected}"
        )
    result = weight.float()
    grids = factors.reshape(-1, *expected[-2:])
    for matrix, scales in zip(result.view(-1, rows, columns), grids, strict=True):
        wide = scales.repeat_interleave(size[1], 1)[:, :columns]
        for strip, factor in zip(matrix.split(size[0]), wide, strict=True):
            strip.mul_(factor)
    return result


def from_mxfp4(name: str, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Unpack 4-bit numbers with an exponent for each block.

    Args:
        name: The tensor, for errors.
        blocks: Bytes `(experts, out, groups, bytes)`, the lower half of a byte being the first number.
        scales: Exponents `(experts, out, groups)`.

    Returns:
        Float32, `(experts, in, out)`: gpt-oss multiplies from the right.

    Raises:
        CheckpointError: The scales do not fit the blocks.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape[:-1] != scales.shape:
        raise CheckpointError(
            f"{name}{_BLOCKS} is {blocks.dtype} of shape {tuple(blocks.shape)}, {name}{_SCALES} is "
            f"{scales.dtype} of shape {tuple(scales.shape)}: expected bytes, and one scale for each block"
        )
    table = torch.tensor(_E2M1, device=blocks.device)
    numbers = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), dim=-1).flatten(-2)
    numbers.mul_(_powers_of_two(scales).unsqueeze(-1))
    return numbers.flatten(-2).transpose(-1, -2).contiguous()


def _powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    return exponents.view(torch.float8_e8m0fnu).float()
