"""What is in a state dict, as opposed to where it goes: names, forms and dtypes. No I/O happens here.

Three parties can have a say. *Converters* have changed the model (adapters, quantisation) and know which keys
are theirs and how to undo it. *Storage converters* give keys of the model another form in files. A *state
dict adapter* translates between the model and Hugging Face.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import torch

from patchers.errors import CheckpointError, ConfigError
from patchers.names import fold
from sharded_ckpt.training.choice import choice_of

StateDict = dict[str, Any]

_ORDINARY_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


class StateDictMode(str, Enum):
    """Which view of a model `ModelWrapper.state_dict` gives."""

    FULL = "full"
    """Everything, as it is in memory: to resume."""
    BASE = "base"
    """Without the keys that converters own: what a checkpoint of the base model fills."""
    ADAPTER = "adapter"
    """The keys that converters own, and nothing else."""
    EXPORT = "export"
    """With every converter undone: a model for others."""

    @classmethod
    def of(cls, mode: StateDictMode | str) -> StateDictMode:
        """Return the mode of a name.

        Raises:
            ConfigError: There is no such mode.
        """
        return choice_of(cls, mode, "the mode of a state dict")


class BaseStateDictAdapter(ABC):
    """Translates state dicts between a model's names and forms and those of Hugging Face, in both directions.

    Both methods return a new dict, leave the tensors that they are given alone, and pass on keys that they do
    not know. They must also work on meta tensors: plans are made with those.

    Args:
        model_config: The config of the model, for adapters that need one.
        hf_assets_path: A directory of Hugging Face files, for adapters that need one. Nothing is read here.
        fqn_to_index_mapping: In which file of a reference checkpoint each of its tensors is, counted from 1.
    """

    def __init__(
        self,
        model_config: Any = None,
        hf_assets_path: str | None = None,
        *,
        fqn_to_index_mapping: Mapping[str, int] | None = None,
    ) -> None:
        self.model_config, self.hf_assets_path = model_config, hf_assets_path
        self.fqn_to_index_mapping = None if fqn_to_index_mapping is None else dict(fqn_to_index_mapping)

    @abstractmethod
    def to_hf(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return the state dict as Hugging Face has it."""

    @abstractmethod
    def from_hf(self, hf_state_dict: Mapping[str, Any]) -> StateDict:
        """Return what `to_hf` was called on."""


@runtime_checkable
class StateDictConverter(Protocol):
    """Something that has changed a model, as far as checkpoints must know of it."""

    def key_filter(self, fqn: str) -> bool:
        """Return whether a key is the converter's own: the base model has no such key."""

    def state_dict_transform(self, state_dict: StateDict) -> StateDict:
        """Return the model's state dict with the converter undone; tensors are not changed in place."""

    def state_dict_adapter(self) -> BaseStateDictAdapter | None:
        """Return what translates the converter's own keys for others; None if nobody else knows them."""


class StorageConverter(BaseStateDictAdapter):
    """A `StateDictConverter` that gives keys of the model another form in files, and back.

    It owns no keys: the base model has them, too. Undone is what `to_hf` gives.
    """

    def key_filter(self, fqn: str) -> bool:
        """Return False."""
        return False

    def state_dict_transform(self, state_dict: StateDict) -> StateDict:
        """Return the form in files."""
        return self.to_hf(state_dict)

    def state_dict_adapter(self) -> BaseStateDictAdapter | None:
        """Return itself."""
        return self


class StateDictTransforms:
    """All that is done to a state dict between a model and a file. None of it changes the live model.

    Args:
        sd_adapter: Between the model and Hugging Face.
        export_dtype: What ordinary floating-point tensors are cast to for others; None for what they are.
        converters: In the order in which they were applied to the model; they are undone in reverse.
        hf_assets_path: Where files of Hugging Face are that belong to the model; that of the adapter if not
            given.

    Raises:
        ConfigError: A converter lacks one of the three hooks, or the dtype is not a floating one.

    Example:
        >>> transforms = StateDictTransforms(export_dtype=torch.bfloat16)
        >>> exported = transforms.export({"weight": torch.ones(2), "steps": torch.tensor(3)})
        >>> {name: str(tensor.dtype) for name, tensor in exported.items()}
        {'weight': 'torch.bfloat16', 'steps': 'torch.int64'}
    """

    def __init__(
        self,
        sd_adapter: BaseStateDictAdapter | None = None,
        export_dtype: torch.dtype | None = None,
        *,
        converters: Sequence[StateDictConverter] = (),
        hf_assets_path: str | None = None,
    ) -> None:
        for converter in converters:
            if not isinstance(converter, StateDictConverter):
                raise ConfigError(
                    f"a {type(converter).__name__} is no converter: it needs key_filter(fqn), "
                    "state_dict_transform(state_dict) and state_dict_adapter()"
                )
        if export_dtype is not None and export_dtype not in _ORDINARY_FLOATS:
            known = ", ".join(sorted(str(dtype) for dtype in _ORDINARY_FLOATS))
            raise ConfigError(f"export_dtype is {export_dtype}; it must be one of {known}")
        self._adapter, self._dtype, self.converters = sd_adapter, export_dtype, tuple(converters)
        self._assets = hf_assets_path or getattr(sd_adapter, "hf_assets_path", None)

    @property
    def sd_adapter(self) -> BaseStateDictAdapter | None:
        """What translates between the model and Hugging Face."""
        return self._adapter

    @property
    def export_dtype(self) -> torch.dtype | None:
        """What floating-point tensors are cast to for others."""
        return self._dtype

    @property
    def hf_assets_path(self) -> str | None:
        """Where files of Hugging Face are that belong to the model."""
        return self._assets

    @property
    def fqn_to_index_mapping(self) -> dict[str, int] | None:
        """In which file of a reference checkpoint each tensor is; of all adapters together.

        Raises:
            ConfigError: Two adapters place one tensor in different files.
        """
        merged: dict[str, int] = {}
        adapters = [self._adapter, *(converter.state_dict_adapter() for converter in self.converters)]
        for adapter in adapters:
            for name, index in (getattr(adapter, "fqn_to_index_mapping", None) or {}).items():
                if merged.setdefault(name, index) != index:
                    raise ConfigError(
                        f"two adapters place {name} in different files: {merged[name]} and {index}"
                    )
        return merged or None

    @property
    def described(self) -> list[str]:
        """What the form in files is made by, to be compared when it is read."""
        return [repr(converter) for converter in self.converters if isinstance(converter, StorageConverter)]

    # Whose keys

    def key_filter(self, fqn: str) -> bool:
        """Return whether a converter owns a key.

        Raises:
            ConfigError: Two do.
        """
        return self._owner(fqn) is not None

    def _owner(self, fqn: str) -> int | None:
        owners = [number for number, one in enumerate(self.converters) if one.key_filter(fqn)]
        if len(owners) > 1:
            names = " and ".join(type(self.converters[number]).__name__ for number in owners)
            raise ConfigError(f"{names} both own {fqn}: a key belongs to one converter, or to the base model")
        return owners[0] if owners else None

    def split(self, state_dict: Mapping[str, Any]) -> tuple[StateDict, list[StateDict]]:
        """Return the keys of the base model, and those of each converter.

        Raises:
            ConfigError: Two converters own one key.
        """
        base: StateDict = {}
        shares: list[StateDict] = [{} for _ in self.converters]
        for fqn, value in state_dict.items():
            owner = self._owner(fqn)
            (base if owner is None else shares[owner])[fqn] = value
        return base, shares

    # What is done

    def state_dict_transform(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return a state dict with all converters undone, the last one first."""
        self.split(state_dict)  # refuses keys of two owners
        result = dict(state_dict)
        for converter in reversed(self.converters):
            result = converter.state_dict_transform(result)
        return result

    def apply_dtype_convert(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return a state dict with ordinary floating-point tensors cast to the dtype of exports.

        Integers, quantised tensors (of one byte or less) and what is no tensor stay what they are.
        """
        return {fqn: self._cast(value) for fqn, value in state_dict.items()}

    def apply_to_hf(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return a state dict for others: converters' keys by their adapters, the rest by the model's.

        Raises:
            ConfigError: The model has no adapter.
            CheckpointError: Two adapters give one name.
        """
        return self._adapt(state_dict, self._required("written for Hugging Face").to_hf, "to_hf")

    def apply_from_hf(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return what `apply_to_hf` was called on, if it had no keys of converters.

        Raises:
            ConfigError: The model has no adapter.
        """
        return self._required("read from Hugging Face's form").from_hf(dict(state_dict))

    def export(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return a state dict for others: converters undone (in the model's own dtype), cast, translated."""
        result = self.apply_dtype_convert(self.state_dict_transform(state_dict))
        return result if self._adapter is None else self.apply_to_hf(result)

    def to_storage(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return a state dict in its form in files: what storage converters do, the last one first."""
        result = dict(state_dict)
        for converter in reversed(self.converters):
            if isinstance(converter, StorageConverter):
                result = converter.to_hf(result)
        return result

    def from_storage(self, state_dict: Mapping[str, Any]) -> StateDict:
        """Return what `to_storage` was called on."""
        result = dict(state_dict)
        for converter in self.converters:
            if isinstance(converter, StorageConverter):
                result = converter.from_hf(result)
        return result

    def _adapt(self, state_dict: Mapping[str, Any], base_adapter: Any, method: str) -> StateDict:
        base, shares = self.split(state_dict)
        result = base_adapter(base)
        for converter, share in zip(reversed(self.converters), reversed(shares), strict=True):
            adapter = converter.state_dict_adapter()
            said = getattr(adapter, method)(share) if adapter is not None and share else share
            if twice := result.keys() & said.keys():
                raise CheckpointError(f"two adapters give {fold(twice)}: one would overwrite the other")
            result = {**result, **said}
        return dict(result)

    def _required(self, doing: str) -> BaseStateDictAdapter:
        if self._adapter is None:
            raise ConfigError(f"a state dict cannot be {doing} without an adapter: pass sd_adapter=…")
        return self._adapter

    def _cast(self, value: Any) -> Any:
        if self._dtype is None or not isinstance(value, torch.Tensor) or value.dtype not in _ORDINARY_FLOATS:
            return value
        return value.to(self._dtype)
