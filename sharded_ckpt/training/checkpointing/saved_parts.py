"""What a checkpoint has of model and optimizers: of live ones, or of a state dict that was made before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from patchers.errors import ConfigError
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.training.checkpointing.config import CheckpointConfig
from sharded_ckpt.training.checkpointing.state_dict import PrebuiltModel, PrebuiltOptimizer
from sharded_ckpt.training.checkpointing.targets import SaveTarget
from sharded_ckpt.training.model_state import ModelState
from sharded_ckpt.training.optimizer_state import OptimizerState
from sharded_ckpt.training.state_files import SavedModel, SavedOptimizer, StagedState

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from sharded_ckpt.training.checkpointing.train_state import GlobalState


@dataclass(frozen=True)
class SavedParts:
    """What is saved of model and optimizers."""

    model: SavedModel
    optimizer: SavedOptimizer | None

    def staged(self, state: GlobalState, target: SaveTarget, control: Coordinator) -> StagedState:
        """Collect the tensors that this rank writes."""
        transforms, where = state.transforms, target.directory
        if not target.is_local:
            return StagedState.gather(self.model, self.optimizer, control, transforms=transforms, where=where)
        with together(control, f"collecting the training state for {where}"):
            staged = StagedState.of_rank(self.model, self.optimizer, transforms=transforms, where=where)
        return staged


def saved_parts_of(
    state: GlobalState,
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer | Sequence[Optimizer] | None,
    scheduler: Any | None,
    prebuilt: Mapping[str, Any] | None,
) -> SavedParts:
    """Return what is saved: of model and optimizers as they are, or of a state dict made before.

    Raises:
        ConfigError: The state dict is of another step, or lacks what is to be saved.
    """
    config = state.checkpoint_config
    if prebuilt is not None:
        _check_prebuilt(prebuilt, config, state.train_state.step)
        kept = PrebuiltOptimizer(prebuilt) if config.save_optim and prebuilt.get("optimizer") else None
        return SavedParts(PrebuiltModel(prebuilt), kept)
    saved = ModelState(model, is_peft=state.peft_config is not None)
    if optimizer is None or not config.save_optim:
        return SavedParts(saved, None)
    return SavedParts(saved, OptimizerState(model, optimizer, scheduler))


def _check_prebuilt(prebuilt: Mapping[str, Any], config: CheckpointConfig, step: int) -> None:
    if config.also_save_hf_checkpoint:
        raise ConfigError(
            "also_save_hf_checkpoint needs the model, which prebuilt_state_dict is in place of: pass only one"
        )
    iteration = prebuilt.get("iteration", step)
    if iteration != step:
        raise ConfigError(
            f"prebuilt_state_dict is of step {iteration}, state.train_state of step {step}: save it before "
            "the next step is taken"
        )
