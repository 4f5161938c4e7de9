"""`hf/` in the checkpoint of a step: what Hugging Face's loaders open, written with the rest of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from torch import Tensor, nn

from sharded_ckpt.checkpoint.coordinator import Coordinator
from sharded_ckpt.checkpoint.transaction import Transaction
from sharded_ckpt.saving.prepared import PreparedCheckpoint
from sharded_ckpt.training.adapter_files import PreparedAdapter
from sharded_ckpt.training.adapters import made_by_peft
from sharded_ckpt.training.export import exported_state
from sharded_ckpt.training.merged import MergedAdapters
from sharded_ckpt.training.places import parts_of
from sharded_ckpt.training.tensor_groups import TensorWriter
from sharded_ckpt.training.transforms import StateDictTransforms

if TYPE_CHECKING:
    from sharded_ckpt.training.checkpointing.train_state import GlobalState

HF_WEIGHTS_SUBDIR: Final = "hf"


@dataclass(frozen=True)
class HFExport:
    """What this rank writes of `hf/`.

    Attributes:
        prepared: The whole model; or its adapter, where only that is saved.
    """

    prepared: PreparedCheckpoint | PreparedAdapter

    @classmethod
    def gather(
        cls,
        state: GlobalState,
        model: nn.Module | Sequence[nn.Module],
        control: Coordinator,
        *,
        where: str | os.PathLike[str],
    ) -> HFExport:
        """Agree with all ranks on what is written by whom; collective.

        Converters of `state.transforms` are undone. Adapters of peft are merged into the weights; where only
        adapters are saved (`state.peft_config`), the result is an adapter in peft's files.

        Args:
            state: Says how the model's tensors become those in files.
            model: The model of this rank, or its parts.
            control: All ranks.
            where: The directory of the step.

        Raises:
            ConfigError: The model has no config.
            CheckpointError: Ranks have different tensors of one name.
            CollectiveError: In place of these on all ranks, when some of several failed.
        """
        directory = f"{os.fspath(where)}/{HF_WEIGHTS_SUBDIR}"
        if state.peft_config is not None:
            return cls(PreparedAdapter.gather(model, control, where=directory))
        transforms = _merging(state.transforms or StateDictTransforms(), parts_of(model))
        exported, config = exported_state(model, control, transforms=transforms, where=directory)
        return cls(PreparedCheckpoint.gather(exported, directory, control, config=config))

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What this rank writes, by its names in files."""
        return self.prepared.tensors

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> HFExport:
        """Return the same with other memory."""
        return replace(self, prepared=replace(self.prepared, tensors=tensors))

    def write(self, save: Transaction, write_tensors: TensorWriter, max_shard_size: int | str | None) -> None:
        """Put it into a save."""
        folder = f"{HF_WEIGHTS_SUBDIR}/"
        if isinstance(self.prepared, PreparedAdapter):
            self.prepared.write(save, folder)
            return
        write_tensors(save, {f"{folder}model": self.tensors}, max_shard_size)
        self.prepared.write_files(save, folder)


def _merging(transforms: StateDictTransforms, parts: Sequence[nn.Module]) -> StateDictTransforms:
    """Return transforms that also merge the adapters of models made by peft, if nothing there owns them."""
    adapted = [part for part in parts if made_by_peft(part)]
    names = [name for part in adapted for name, _ in part.named_parameters() if "lora_" in name]
    if not adapted or any(map(transforms.key_filter, names)):
        return transforms
    merging = [MergedAdapters(part) for part in adapted]
    return StateDictTransforms(
        transforms.sd_adapter,
        transforms.export_dtype,
        converters=[*transforms.converters, *merging],
        hf_assets_path=transforms.hf_assets_path,
    )
