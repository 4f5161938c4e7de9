"""Stock converters: what files call or store otherwise than a model in memory does."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import torch

from patchers.errors import ConfigError, MissingKeysError
from patchers.names import block_of, fold
from sharded_ckpt.training.glu import _deinterleave_glu_tensor, _interleave_glu_tensor
from sharded_ckpt.training.key_names import (
    _PREFIX,
    _add_outer_prefix,
    _drop_outer_prefix,
    _rename_dora_keys_from_hf,
    _rename_dora_keys_to_hf,
)
from sharded_ckpt.training.places import without_extra_state
from sharded_ckpt.training.transforms import BaseStateDictAdapter, StateDict, StorageConverter

Sizes: TypeAlias = "int | Mapping[int, int]"

GATE_UP = r"\.(gate_up_proj|linear_fc1)\.(weight|bias)$"
"""Names of matrices that hold a gate and an up projection, in transformers and in Megatron."""


class GLUInterleave(StorageConverter):
    """A gate and up projection that is interleaved in memory, and one after the other in files.

    Args:
        sizes: How many rows stay together: one number, or one for each block (blocks that are not named are
            not interleaved). It must divide the width of the block's FFN.
        pattern: A regular expression for the names that this is about.
    """

    def __init__(self, sizes: Sizes, pattern: str = GATE_UP) -> None:
        super().__init__()
        self.sizes = sizes if isinstance(sizes, int) else dict(sizes)
        self.pattern = pattern

    def __repr__(self) -> str:
        return f"GLUInterleave({self.sizes!r}, {self.pattern!r})"

    def to_hf(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return the matrices with the gate first and the up projection after it."""
        return self._each(state_dict, _deinterleave_glu_tensor)

    def from_hf(self, hf_state_dict: Mapping[str, Any]) -> StateDict:
        """Return the matrices interleaved."""
        return self._each(hf_state_dict, _interleave_glu_tensor)

    def _each(
        self, state: Mapping[str, Any], change: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> StateDict:
        result = dict(state)
        for name, tensor in state.items():
            size = self._size_of(name)
            if size is not None:
                try:
                    result[name] = change(tensor, size)
                except ConfigError as error:
                    raise ConfigError(f"{name}: {error}") from None
        return result

    def _size_of(self, name: str) -> int | None:
        if re.search(self.pattern, name) is None:
            return None
        if isinstance(self.sizes, int):
            return self.sizes
        block = block_of(name)
        return None if block is None else self.sizes.get(block)


class SplitGateUp(StorageConverter):
    """A gate and up projection that is one matrix in memory (`gate_up_proj`), and two in files.

    The widths may differ from block to block: every matrix is cut in its middle.
    """

    _fused = re.compile(r"\.gate_up_proj\.(weight|bias)$")
    _half = re.compile(r"\.(gate|up)_proj\.(weight|bias)$")

    def __repr__(self) -> str:
        return "SplitGateUp()"

    def to_hf(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return `gate_proj` and `up_proj` for each `gate_up_proj`."""
        result: StateDict = {}
        for name, tensor in state_dict.items():
            if (match := self._fused.search(name)) is None:
                result[name] = tensor
                continue
            if tensor.shape[0] % 2:
                raise ConfigError(f"{name} has {tensor.shape[0]} rows, which are no gate and up projection")
            for half, part in zip(("gate", "up"), tensor.chunk(2), strict=True):
                result[f"{name[: match.start()]}.{half}_proj.{match[1]}"] = part
        return result

    def from_hf(self, hf_state_dict: Mapping[str, Any]) -> StateDict:
        """Return `gate_up_proj` for each `gate_proj` and `up_proj`.

        Raises:
            MissingKeysError: There is one without the other.
        """
        result: StateDict = {}
        for name, tensor in hf_state_dict.items():
            if (match := self._half.search(name)) is None:
                result[name] = tensor
                continue
            begin = name[: match.start()]
            halves = [f"{begin}.{half}_proj.{match[2]}" for half in ("gate", "up")]
            if missing := [half for half in halves if half not in hf_state_dict]:
                raise MissingKeysError(f"{fold(missing)} is missing: {name} is one half of a gate_up_proj")
            if match[1] == "gate":
                result[f"{begin}.gate_up_proj.{match[2]}"] = torch.cat([hf_state_dict[h] for h in halves])
        return result


class PrefixKeys(StorageConverter):
    """Names that have a prefix in files and none in memory.

    Args:
        prefix: The prefix.
        skip_keys: Names that have it in neither.

    Example:
        >>> list(PrefixKeys("base_model.model.").to_hf({"lm_head.weight": 0}))
        ['base_model.model.lm_head.weight']
    """

    def __init__(self, prefix: str = _PREFIX, skip_keys: Collection[str] = ()) -> None:
        super().__init__()
        self.prefix, self.skip_keys = prefix, frozenset(skip_keys)

    def __repr__(self) -> str:
        return f"PrefixKeys({self.prefix!r}, {sorted(self.skip_keys)!r})"

    def to_hf(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return the state dict with the prefix."""
        result = dict(state_dict)
        _add_outer_prefix(result, self.prefix, list(self.skip_keys))
        return result

    def from_hf(self, hf_state_dict: Mapping[str, Any]) -> StateDict:
        """Return the state dict without the prefix."""
        result = dict(hf_state_dict)
        _drop_outer_prefix(result, self.prefix)
        return result


class DoRAKeys(StorageConverter):
    """DoRA magnitudes: `lora_magnitude` in memory, `lora_magnitude_vector` in peft's files."""

    def __repr__(self) -> str:
        return "DoRAKeys()"

    def to_hf(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return the state dict with peft's names."""
        result = dict(state_dict)
        _rename_dora_keys_to_hf(result)
        return result

    def from_hf(self, hf_state_dict: Mapping[str, Any]) -> StateDict:
        """Return the state dict with the names in memory."""
        result = dict(hf_state_dict)
        _rename_dora_keys_from_hf(result)
        return result


class DropExtraState(StorageConverter):
    """Leaves the extra states of modules (`_extra_state`) out of files, and nothing else."""

    def __repr__(self) -> str:
        return "DropExtraState()"

    def to_hf(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return the state dict without extra states."""
        return without_extra_state(state_dict)

    def from_hf(self, hf_state_dict: Mapping[str, Any]) -> StateDict:
        """Return the state dict without extra states."""
        return without_extra_state(hf_state_dict)


class AdapterKeys:
    """A `StateDictConverter` for adapters: it owns their keys, and is undone by leaving them out.

    What they have learnt is lost then; to put it into the weights, use `MergedAdapters`.

    Args:
        owns: Whether a key is the adapter's; by default every one with a `lora_…` or `modules_to_save` in it.
        adapter: What translates their names for others.
    """

    def __init__(
        self, owns: Callable[[str], bool] | None = None, adapter: BaseStateDictAdapter | None = None
    ) -> None:
        from sharded_ckpt.training.adapters import is_adapter_name

        self._owns, self._adapter = owns or is_adapter_name, adapter

    def key_filter(self, fqn: str) -> bool:
        """Return whether a key is the adapter's."""
        return self._owns(fqn)

    def state_dict_transform(self, state_dict: StateDict) -> StateDict:
        """Return the state dict without the adapter."""
        return {fqn: value for fqn, value in state_dict.items() if not self._owns(fqn)}

    def state_dict_adapter(self) -> BaseStateDictAdapter | None:
        """Return what translates the adapter's names for others."""
        return self._adapter


class PeftNames(BaseStateDictAdapter):
    """Between the names of an adapter in memory and peft's, for models that peft did not make."""

    def to_hf(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return the names in peft's files."""
        return PrefixKeys("base_model.model.").to_hf(DoRAKeys().to_hf(state_dict))

    def from_hf(self, hf_state_dict: Mapping[str, Any]) -> StateDict:
        """Return the names in memory."""
        return DoRAKeys().from_hf(PrefixKeys("base_model.model.").from_hf(hf_state_dict))
