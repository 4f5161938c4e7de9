"""Adapters in the files that peft has: `adapter_model.safetensors` and `adapter_config.json`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from patchers.errors import ConfigError
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.checkpoint.publish import Transaction, transaction
from sharded_ckpt.checkpoint.reader import open_checkpoint
from sharded_ckpt.checkpoint.tensors import torch_dtype
from sharded_ckpt.checkpoint.writer import describe
from sharded_ckpt.collective.control_group import ControlGroup
from sharded_ckpt.runtime import as_runtime
from sharded_ckpt.saving.saved_tensors import SavedTensors
from sharded_ckpt.training.adapters import adapter_config
from sharded_ckpt.training.audit import FillReport, StrictHandling, audit_keys
from sharded_ckpt.training.dtensors import whole_tensors
from sharded_ckpt.training.model_state import ModelState
from sharded_ckpt.training.weights import SafetensorsWeights, Weights

if TYPE_CHECKING:
    from sharded_ckpt.runtime import Runtime

WEIGHTS_FILE: Final = "adapter_model.safetensors"
CONFIG_FILE: Final = "adapter_config.json"


def save_adapter(
    directory: str | os.PathLike[str],
    model: ModelState | nn.Module,
    *,
    config: Mapping[str, Any] | None = None,
    runtime: Runtime | Any = None,
    durable: bool = True,
    overwrite: bool = True,
) -> None:
    """Save the adapter that the ranks have trained, as peft saves one: `PeftModel.from_pretrained` opens it.

    Collective. peft reads one file, so the adapter (not the model) is brought to rank 0.

    Args:
        directory: Where to.
        model: The model with its adapter; a `ModelState` of one, with `is_peft`.
        config: The content of adapter_config.json; by default what the models made by peft say.
        runtime: Where we are. By default torch.distributed says, or this is the only process.
        durable: Whether the files must survive a power cut once this returns.
        overwrite: Whether the directory may hold something already.

    Raises:
        ConfigError: No rank has a model made by peft, and no config was given; or the ranks' configs differ.
        MissingKeysError: There is no adapter on any rank.
        CollectiveError: In place of these on all ranks, when some of several failed.
    """
    control = as_runtime(runtime).control
    prepared = PreparedAdapter.gather(model, control, config=config, where=directory)
    with transaction(directory, control, durable=durable, overwrite=overwrite) as save:
        prepared.write(save)


@dataclass(frozen=True)
class PreparedAdapter:
    """An adapter, ready to be written by rank 0, which has all of it.

    Attributes:
        tensors: By the names that peft gives them in its files; on other ranks there are none.
        config: The content of adapter_config.json; None on other ranks.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None

    @classmethod
    def gather(
        cls,
        model: ModelState | nn.Module | Sequence[nn.Module],
        control: Coordinator,
        *,
        config: Mapping[str, Any] | None = None,
        where: object = "a directory",
    ) -> PreparedAdapter:
        """Bring the adapter to rank 0; collective. See `save_adapter` for arguments and errors."""
        with together(control, f"preparing to save an adapter to {where}"):
            state = _adapter_state(model)
            tensors: dict[str, Tensor] = state.state_dict()
            said = next(filter(None, map(adapter_config, state.model)), None)
            said = said if config is None else dict(config)
        agreed = _agreed_config(said, control)
        tensors = whole_tensors(tensors, control, where)
        with together(control, f"preparing to save an adapter to {where}"):
            mine = SavedTensors.named(tensors, None, {})
        _, division = mine.divide(control, where)
        tensors = _on_rank_0(mine.written_by(control.rank, division), control)
        return cls(tensors, agreed if control.rank == 0 else None)

    def write(self, save: Transaction, folder: str = "") -> None:
        """Put it into a save, in a folder of it (which ends in `/`)."""
        if self.config is not None:
            save.write_file(f"{folder}{WEIGHTS_FILE}", self.tensors)
            save.write_json(f"{folder}{CONFIG_FILE}", self.config)


def load_adapter(
    directory: str | os.PathLike[str],
    model: ModelState | nn.Module,
    *,
    runtime: Runtime | Any = None,
    strictness: StrictHandling | str = StrictHandling.RAISE_ALL,
) -> FillReport:
    """Fill the adapter on all ranks from peft's files, each rank with what belongs to its blocks.

    Args:
        directory: What `save_adapter`, or peft, has written.
        model: The model, with an adapter of the same config on it.
        runtime: Where we are. By default torch.distributed says, or this is the only process.
        strictness: What to do about keys that one side lacks: see `StrictHandling`.

    Raises:
        MissingKeysError: The adapter of some rank has tensors that are not in the file.
        CheckpointError: The file has tensors that no rank wants, or some of another shape.
        CollectiveError: In place of these on all ranks, when only some of several found it.
    """
    control = as_runtime(runtime).control
    with together(control, f"comparing the adapter with {directory}"):
        mode, state = StrictHandling.of(strictness), _adapter_state(model)
        reader = open_checkpoint(Path(directory) / WEIGHTS_FILE)
        weights = Weights(SafetensorsWeights(reader, str(directory)), state)
        weights.compare()
    missing, unexpected = audit_keys(weights.plan, weights.found, mode, control, weights.where)
    with together(control, f"loading the adapter {directory}"):
        filled = weights.fill()
    return FillReport(filled, missing, unexpected, weights.plan.cast)


def _adapter_state(model: ModelState | nn.Module | Sequence[nn.Module]) -> ModelState:
    if not isinstance(model, ModelState):
        return ModelState(model, is_peft=True)
    if not model.is_peft:
        raise ConfigError("this ModelState is that of the whole model: make it with is_peft=True")
    return model


def _agreed_config(said: Mapping[str, Any] | None, control: Coordinator) -> dict[str, Any]:
    configs = [one for one in control.gather(said, "comparing the adapters of the ranks") if one is not None]
    with together(control, "comparing the adapters of the ranks"):
        if not configs:
            raise ConfigError(
                "no rank has a model made by peft, which would know its config: pass config=… with the "
                "content of adapter_config.json"
            )
        odd = {name for one in configs for name in one if one[name] != configs[0].get(name)}
        if odd:
            raise ConfigError(f"the adapters of the ranks have different {', '.join(sorted(odd))}")
        return dict(configs[0])


def _on_rank_0(tensors: Mapping[str, Tensor], control: Coordinator) -> dict[str, Tensor]:
    """Bring tensors to rank 0, where all of them are returned; the other ranks return none."""
    if not isinstance(control, ControlGroup):
        return dict(tensors)
    specs = control.gather(describe(tensors), "announcing the adapters of the ranks")
    control.connect()
    with together(control, "bringing the adapter to rank 0"):
        if control.rank != 0:
            control.send_tensors({0: tensors.values()})
            return {}
        gathered = dict(tensors)
        for rank, table in enumerate(specs[1:], start=1):
            for name, (dtype, shape) in table.items():
                gathered[name] = torch.empty(shape, dtype=torch_dtype(dtype))
                control.receive_tensor(gathered[name], rank)
        return gathered
