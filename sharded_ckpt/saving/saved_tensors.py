"""What one rank brings to a save: the tensors of its shard, under the names that they have in the files."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from patchers.errors import ConfigError
from patchers.families import PLAIN_FAMILIES
from patchers.substitutes import Unowned
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.checkpoint.raw import bytes_of
from sharded_ckpt.checkpoint.writer import describe
from sharded_ckpt.collective.control_group import chunks
from sharded_ckpt.distribute.distribution import global_names
from sharded_ckpt.saving.shared_tensors import Division, Share, Shares
from sharded_ckpt.ties import ties_of

_HASHED_AT_ONCE: Final = 8 << 20  # bytes
_WRAPPED_UNDER: Final = ("module", "_orig_mod")


@dataclass(frozen=True)
class SavedTensors:
    """The tensors that one rank could write, before it is known which of them other ranks write.

    Attributes:
        tensors: By their names in the files.
        unowned: The modules that are stubs here; None where a dict was given, which knows no modules.
        ties: Which name the config ties to which.
        alike: Those of the tied names that hold, on this rank, just what their partner holds.
    """

    tensors: Mapping[str, Tensor]
    unowned: tuple[str, ...] | None
    ties: Mapping[str, str]
    alike: tuple[str, ...]

    @classmethod
    def of(
        cls, model_shard: nn.Module | Mapping[str, Tensor], ties: Mapping[str, str] | None = None
    ) -> SavedTensors:
        """Collect the tensors of a module (parameters and persistent buffers), or take those of a dict.

        Args:
            model_shard: The module or the dict.
            ties: Which name is tied to which; by default what a module's config says, and none of a dict.

        Raises:
            ConfigError: It is neither, or the module holds what cannot be saved this way.
            CheckpointError: Tensors without values, or that the file format does not know; they are named.
        """
        if not isinstance(model_shard, nn.Module | Mapping):
            raise ConfigError(
                "what is saved is a module or a dict of tensors by name, found "
                f"{type(model_shard).__name__}; pass the model itself, or its state_dict()"
            )
        stubs, told = None, {}
        if isinstance(model_shard, Mapping):
            tensors = _named(model_shard, "the state dict")
        else:
            model = unwrapped(model_shard)
            _refuse_unsavable(model)
            tensors = _named(_state_of(model), type(model).__name__)
            stubs = tuple(module.name for module in model.modules() if isinstance(module, Unowned))
            told = ties_of(getattr(model, "config", None), type(model), model)
        return cls.named(tensors, stubs, told if ties is None else ties)

    @classmethod
    def named(
        cls, tensors: Mapping[str, Tensor], unowned: tuple[str, ...] | None, ties: Mapping[str, str]
    ) -> SavedTensors:
        """Take tensors that have been collected, under the names that they have in the files.

        Raises:
            CheckpointError: Tensors without values, or that the file format does not know; they are named.
        """
        describe(tensors)
        alike = tuple(target for target, source in ties.items() if _same(tensors, target, source))
        return cls(tensors, unowned, ties, alike)

    @property
    def share(self) -> Share:
        """What the other ranks must know of it."""
        return Share(describe(self.tensors), self.unowned, dict(self.ties), self.alike)

    def digests(self, names: Collection[str]) -> dict[str, str]:
        """Return what tells the bytes of those of these tensors that this rank has."""
        return {name: digest(self.tensors[name]) for name in names if name in self.tensors}

    def divide(self, control: Coordinator, where: object) -> tuple[Shares, Division]:
        """Agree with the other ranks on who writes what; collective.

        Args:
            control: The ranks.
            where: What is saved to, for errors.
        """
        said = control.gather(self.share.to_plain(), f"comparing what the ranks save to {where}")
        with together(control, f"dividing what is saved to {where}"):
            shares = Shares([Share.from_plain(share) for share in said])
            digests = self.digests(shares.uncertain)
        told = [digests]
        if shares.uncertain:
            told = control.gather(digests, f"comparing what several ranks save to {where}")
        with together(control, f"dividing what is saved to {where}"):
            return shares, shares.divide(told)

    def written_by(self, rank: int, division: Division) -> dict[str, Tensor]:
        """Return the tensors that this rank writes."""
        return {name: tensor for name, tensor in self.tensors.items() if division.writers.get(name) == rank}


def in_files(model_shard: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors under the names, and in the form, that checkpoints of the model's family have.

    Most families keep in memory just what is in their files; others rename, or fuse experts. transformers
    notes on the model how it was loaded, and turns that around.

    Args:
        model_shard: The module; or a dict, whose tensors stay what they are.
        tensors: Those that are written, by their names in memory.
    """
    model = unwrapped(model_shard) if isinstance(model_shard, nn.Module) else None
    if not isinstance(model, PreTrainedModel) or model.config.model_type in PLAIN_FAMILIES or not tensors:
        return tensors
    return revert_weight_conversion(model, dict(tensors))


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the model inside of the wrappers of torch.compile and data parallelism.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(model)) is model
        True
    """
    while len(children := list(module.named_children())) == 1 and children[0][0] in _WRAPPED_UNDER:
        module = children[0][1]
    return module


def digest(tensor: Tensor) -> str:
    """Return what tells the bytes of a tensor from others: its dtype, its shape and their SHA-256.

    Example:
        >>> digest(torch.zeros(2, 3)) == digest(torch.zeros(3, 2).T)
        True
    """
    hasher = hashlib.sha256()
    for chunk in chunks(tensor.detach(), _HASHED_AT_ONCE):
        hasher.update(_bytes_of(chunk.cpu()).numpy().data)
    return f"{tensor.dtype} {tuple(tensor.shape)} {hasher.hexdigest()}"


def _named(state: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Return tensors by their global names."""
    names = global_names(state, where)
    return {names[key]: value for key, value in state.items()}


def _state_of(model: nn.Module) -> dict[str, Any]:
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return {key: value for key, value in model.state_dict().items() if key not in ignored}


def _same(tensors: Mapping[str, Tensor], target: str, source: str) -> bool:
    if target not in tensors or source not in tensors:
        return False
    one, other = tensors[target], tensors[source]
    if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
        return False
    shared = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return shared or torch.equal(_bytes_of(one), _bytes_of(other))  # as numbers, 0.0 would equal -0.0


def _bytes_of(tensor: Tensor) -> Tensor:
    return bytes_of(tensor.detach().resolve_conj().resolve_neg().contiguous())


def _refuse_unsavable(model: Any) -> None:
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise ConfigError(
            "the model holds adapters (peft), which are no part of a checkpoint of the model: merge them "
            "(merge_and_unload()), or save them by themselves with peft's save_pretrained"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError(
            "the model is quantised, and how its tensors are to be saved is up to its quantiser: pass "
            "model.state_dict() to save_sharded_model to write them as they are"
        )
