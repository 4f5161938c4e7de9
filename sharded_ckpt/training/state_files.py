"""Training state in files: weights and optimizer state as safetensors, the rest as JSON, in one save.

    <directory>/model/model-0000r-of-0000n.safetensors, model.safetensors.index.json
    <directory>/optim/optim-0000r-of-0000n.safetensors, optim.safetensors.index.json, optimizer.json
    <directory>/training_state.json

Every rank writes what it owns, through the same transaction as any other save. Nothing is pickled.
"""

from __future__ import annotations

import copy
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from patchers.errors import ConfigError
from patchers.names import fold
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.checkpoint.publish import Transaction, transaction
from sharded_ckpt.runtime import as_runtime
from sharded_ckpt.saving.saved_tensors import SavedTensors
from sharded_ckpt.training.dtensors import whole_tensors
from sharded_ckpt.training.host_buffers import HostBuffers
from sharded_ckpt.training.model_state import ModelState
from sharded_ckpt.training.optimizer_state import OptimizerState
from sharded_ckpt.training.optimizer_table import OptimizerTable, merge
from sharded_ckpt.training.tensor_groups import Export, TensorWriter, write_groups

if TYPE_CHECKING:
    from sharded_ckpt.runtime import Runtime
    from sharded_ckpt.training.transforms import StateDictTransforms

logger = logging.getLogger(__name__)

MODEL_STEM: Final = "model/model"
OPTIM_STEM: Final = "optim/optim"
OPTIMIZER_FILE: Final = "optim/optimizer.json"
STATE_FILE: Final = "training_state.json"
FORMAT: Final = "sharded_ckpt training state"
VERSION: Final = 1


class SavedModel(Protocol):
    """What is saved of a model: a `ModelState`, or anything that says the same."""

    @property
    def ties(self) -> Mapping[str, str]:
        """Which name is tied to which, in the whole model."""

    @property
    def unowned(self) -> tuple[str, ...] | None:
        """The modules that are stubs here; None where the parts are not to make up a whole model."""

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors by name."""


class SavedOptimizer(Protocol):
    """What is saved of optimizers: an `OptimizerState`, or anything that says the same."""

    @property
    def ties(self) -> Mapping[str, str]:
        """Which key of the state is tied to which."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by key."""

    def table(self) -> OptimizerTable:
        """Return what there is besides tensors."""


@dataclass(frozen=True)
class StagedState:
    """What this rank writes of a training state, agreed upon with all ranks; nothing is written yet.

    Attributes:
        model: The tensors of the model that this rank writes.
        optim: The tensors of the optimizers that this rank writes.
        table: What the optimizers of all ranks keep besides, on the rank that writes it.
        info: The content of training_state.json, on the rank that writes it.
        export: What is written beside it for others, if anything.
        write_tensors: What brings the tensors into a save.
    """

    model: Mapping[str, Tensor]
    optim: Mapping[str, Tensor]
    table: Mapping[str, Any] | None
    info: Mapping[str, Any] | None
    export: Export | None = None
    write_tensors: TensorWriter = write_groups

    @classmethod
    def gather(
        cls,
        model: SavedModel,
        optimizer: SavedOptimizer | None,
        control: Coordinator,
        *,
        transforms: StateDictTransforms | None = None,
        where: object = "a training state",
    ) -> StagedState:
        """Agree with all ranks on who writes what; collective. Nothing waits for another rank after this.

        Args:
            model: What is on this rank.
            optimizer: Those of this rank; None where nothing is trained.
            control: All ranks.
            transforms: What turns the model's tensors into those that are written.
            where: What is saved to, for errors.

        Raises:
            CheckpointError: Ranks have different tensors of one name, or none at all.
            MissingKeysError: No rank owns some part of the model.
            CollectiveError: In place of these on all ranks, when some of several failed.
        """
        with together(control, f"collecting the training state for {where}"):
            tensors, slots, table = _collected(model, optimizer, where)
        tensors = whole_tensors(tensors, control, where)
        slots = whole_tensors(slots, control, where)
        with together(control, f"bringing the training state for {where} into its form in files"):
            tensors = transforms.to_storage(tensors) if transforms else tensors
            mine = SavedTensors.named(tensors, model.unowned, model.ties)
        _, weights = mine.divide(control, where)
        optim = _divide_slots(slots, optimizer, control, where)
        whole = _merge_tables(table, control, where)
        info = _info(control.world_size, transforms, weights.untied)
        first = control.rank == 0
        written = mine.written_by(control.rank, weights)
        return cls(written, optim, whole if first else None, info if first else None)

    @classmethod
    def of_rank(
        cls,
        model: SavedModel,
        optimizer: SavedOptimizer | None,
        *,
        transforms: StateDictTransforms | None = None,
        where: object = "a training state",
    ) -> StagedState:
        """Stage all that is on this rank, for this rank alone; nobody else is asked.

        Args:
            model: What is on this rank.
            optimizer: Those of this rank.
            transforms: What turns the model's tensors into those that are written.
            where: What is saved to, for errors.

        Raises:
            ConfigError: Something is spread over ranks as a DTensor, so that this rank has only a part of it.
        """
        tensors, slots, table = _collected(model, optimizer, where)
        if spread := [name for name, t in {**tensors, **slots}.items() if isinstance(t, DTensor)]:
            raise ConfigError(
                f"{where}: {fold(spread)} is spread over ranks (DTensor), and cannot be saved for one rank "
                "alone: save to a directory that all ranks share"
            )
        written = transforms.to_storage(tensors) if transforms else tensors
        return cls(written, slots, table, _info(1, transforms, {}))

    def write(self, save: Transaction, *, max_shard_size: int | str | None = None) -> None:
        """Put it into a save, which may hold other things, too.

        Args:
            save: One that all ranks take part in.
            max_shard_size: Bytes of tensors in one file, or a text such as `"5GB"`.
        """
        self.write_tensors(save, {MODEL_STEM: self.model, OPTIM_STEM: self.optim}, max_shard_size)
        if self.table is not None:
            save.write_json(OPTIMIZER_FILE, self.table)
        if self.info is not None:
            save.write_json(STATE_FILE, self.info)
        if self.export is not None:
            self.export.write(save, self.write_tensors, max_shard_size)

    def with_export(self, export: Export | None) -> StagedState:
        """Return the same with something that is written beside it for others."""
        return replace(self, export=export)

    def snapshot(self, buffers: HostBuffers | None = None) -> StagedState:
        """Return a copy in host memory, for a save that goes on while training does.

        Args:
            buffers: The memory, whose copies of the save before are overwritten; new memory by default.
        """
        exported = self.export.tensors if self.export else {}
        groups = {"model": self.model, "optim": self.optim, "export": exported}
        copies = (buffers or HostBuffers()).copy(groups)
        table, info = copy.deepcopy((self.table, self.info))
        export = self.export.with_tensors(copies["export"]) if self.export else None
        return StagedState(copies["model"], copies["optim"], table, info, export, self.write_tensors)


def save_training_state(
    directory: str | os.PathLike[str],
    model: ModelState | nn.Module,
    optimizer: OptimizerState | None = None,
    *,
    runtime: Runtime | Any = None,
    transforms: StateDictTransforms | None = None,
    max_shard_size: int | str | None = None,
    durable: bool = True,
    manifest: bool = False,
    overwrite: bool = True,
) -> None:
    """Save the weights and the optimizer state that the ranks hold, so that any number of ranks can go on.

    Collective: all ranks call it, also those that train nothing. Until all are through, and if any of them
    fails, the directory stays as it was.

    Args:
        directory: Where to; it is made if there is none.
        model: A `ModelState`, or a model to make one of.
        optimizer: None on ranks that train nothing.
        runtime: Where we are. By default torch.distributed says, or this is the only process.
        transforms: What turns the model's tensors into those that are written; the optimizer's are written as
            they are.
        max_shard_size: Bytes of tensors in one file, or a text such as `"5GB"`.
        durable: Whether the state must survive a power cut once this returns.
        manifest: Whether to write `manifest.json`, with the size and SHA-256 of each file.
        overwrite: Whether the directory may hold something already.

    Raises:
        CheckpointError: Ranks have different tensors of one name, or a tensor that cannot be written.
        MissingKeysError: No rank owns some part of the model.
        ConfigError: An optimizer or a scheduler keeps something that cannot be written as plain data.
        OSError: The file system failed.
        CollectiveError: In place of these on all ranks, when some of several failed.

    Example:
        >>> import tempfile, torch
        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_training_state(f"{folder}/ckpt", model, OptimizerState(model, optimizer))
        ...     sorted(os.listdir(f"{folder}/ckpt"))
        ['model', 'optim', 'training_state.json']
    """
    control = as_runtime(runtime).control
    with together(control, f"preparing to save to {directory}"):
        state = model if isinstance(model, ModelState) else ModelState(model)
    staged = StagedState.gather(state, optimizer, control, transforms=transforms, where=directory)
    plan = {"max_shard_size": max_shard_size}
    with transaction(
        directory, control, durable=durable, manifest=manifest, overwrite=overwrite, plan=plan
    ) as save:
        staged.write(save, max_shard_size=max_shard_size)


def _collected(
    model: SavedModel, optimizer: SavedOptimizer | None, where: object
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return what this rank has: the tensors of model and optimizers, and what these keep besides."""
    state = model.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if odd := state.keys() - tensors.keys():
        logger.warning("%s: not saved, as it is no tensor: %s", where, fold(sorted(odd)))
    slots = optimizer.tensors() if optimizer else {}
    return tensors, slots, (optimizer.table() if optimizer else OptimizerTable()).to_plain()


def _info(
    world_size: int, transforms: StateDictTransforms | None, untied: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "id": uuid.uuid4().hex,
        "world_size": world_size,
        "transforms": transforms.described if transforms else [],
        "untied": dict(untied),
    }


def _divide_slots(
    slots: Mapping[str, Tensor], optimizer: SavedOptimizer | None, control: Coordinator, where: object
) -> dict[str, Tensor]:
    """Return the tensors of optimizers that this rank writes; there may be none on any rank."""
    if not any(control.gather(len(slots), f"comparing the optimizer state saved to {where}")):
        return {}
    with together(control, f"collecting the optimizer state for {where}"):
        mine = SavedTensors.named(slots, None, optimizer.ties if optimizer else {})
    _, division = mine.divide(control, where)
    return mine.written_by(control.rank, division)


def _merge_tables(table: Mapping[str, Any], control: Coordinator, where: object) -> dict[str, Any]:
    said = control.gather(table, f"comparing the optimizers of what is saved to {where}")
    with together(control, f"comparing the optimizers of what is saved to {where}"):
        return merge([OptimizerTable.from_plain(one, f"rank {r}") for r, one in enumerate(said)]).to_plain()
