"""A training is resumed, or started from weights: resolved, opened, compared, and only then filled in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from patchers.errors import CheckpointError, CheckpointNotFoundError, CollectiveError
from sharded_ckpt.checkpoint.coordinator import Solo, together
from sharded_ckpt.training.audit import StrictHandling
from sharded_ckpt.training.checkpointing.config import CheckpointConfig
from sharded_ckpt.training.checkpointing.contexts import runtime_of
from sharded_ckpt.training.checkpointing.dataloader_state import load_dataloader_state
from sharded_ckpt.training.checkpointing.local import local_manager_of
from sharded_ckpt.training.checkpointing.opened import OpenedCheckpoint, opened
from sharded_ckpt.training.checkpointing.resolution import Resolution, resolve_together
from sharded_ckpt.training.checkpointing.rng_state import set_rng_state
from sharded_ckpt.training.checkpointing.weights_only import _load_model_weights_from_checkpoint
from sharded_ckpt.training.model_state import ModelState
from sharded_ckpt.training.optimizer_state import OptimizerState
from sharded_ckpt.training.state_reading import load_training_state

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from sharded_ckpt.runtime import Runtime
    from sharded_ckpt.training.checkpointing.train_state import GlobalState

logger = logging.getLogger(__name__)

_ATTEMPTS = 5


def load_checkpoint(
    state: GlobalState,
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer | Sequence[Optimizer] | None,
    opt_param_scheduler: Any | None,
    strict: bool = True,
    checkpointing_context: dict[str, Any] | None = None,
    skip_load_to_model_and_opt: bool = False,
    pg_collection: Any = None,
    module_name: str | None = None,
    *,
    train_data_iterator: Any | None = None,
) -> tuple[int, float]:
    """Resume from the newest checkpoint, or start from the weights that the config names.

    Collective: all ranks call it, each with its own part of the model; they may be more or fewer than saved.
    Everything is compared before anything is filled; what does not fit is an error on all ranks. Of what the
    config names nothing is ever passed over in silence: see `CheckpointConfig`.

    Args:
        state: Config and train state; the latter becomes that of the checkpoint.
        model: The model of this rank, or its parts.
        optimizer: None on ranks that train nothing.
        opt_param_scheduler: The learning-rate scheduler, if there is one.
        strict: If not, names that the checkpoint or the model lacks are logged, and left as they are.
        checkpointing_context: What `init_checkpointing_context` gave, if there are local checkpoints.
        skip_load_to_model_and_opt: Take only the step, the random numbers and the place in the data.
        pg_collection: The process group of the ranks that share the model; by default all ranks.
        module_name: Sets apart the random numbers of one of several models.
        train_data_iterator: If it has a state, it is put where it was.

    Returns:
        The step, and the floating-point operations so far; (0, 0) where training begins.

    Raises:
        CheckpointNotFoundError: What the config names is not there. It is a `FileNotFoundError`.
        ConfigError: What it names cannot be resumed from.
        MissingKeysError: The model or an optimizer wants what the checkpoint lacks.
        CheckpointError: Something is broken or does not fit; nothing was filled.
        CollectiveError: In place of these on all of several ranks.
    """
    filled = _Filled(
        state,
        model,
        optimizer,
        opt_param_scheduler,
        strict,
        skip_load_to_model_and_opt,
        module_name,
        train_data_iterator,
    )
    return _load(state.checkpoint_config, filled, runtime_of(state, pg_collection), checkpointing_context)


def _load_checkpoint_from_path(
    load_dir: str,
    state: GlobalState,
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer | Sequence[Optimizer] | None,
    opt_param_scheduler: Any | None,
    strict: bool = True,
    checkpointing_context: dict[str, Any] | None = None,
    skip_load_to_model_and_opt: bool = False,
    ignore_ckpt_step: bool = False,
    pg_collection: Any = None,
    module_name: str | None = None,
) -> tuple[int, float]:
    """Resume from a directory, whatever the config names; all else is as in `load_checkpoint`.

    Args:
        load_dir: The directory of all checkpoints, or of one step. There must be one.
        state: As there.
        model: As there.
        optimizer: As there.
        opt_param_scheduler: As there.
        strict: As there.
        checkpointing_context: As there.
        skip_load_to_model_and_opt: As there.
        ignore_ckpt_step: Take the step that the tracker names also where the config names another one.
        pg_collection: As there.
        module_name: As there.
    """
    config = state.checkpoint_config
    step = None if ignore_ckpt_step else config.ckpt_step
    named = replace(config, load=load_dir, ckpt_step=step, exit_on_missing_checkpoint=True)
    filled = _Filled(
        state, model, optimizer, opt_param_scheduler, strict, skip_load_to_model_and_opt, module_name
    )
    return _load(named, filled, runtime_of(state, pg_collection), checkpointing_context)


@dataclass(frozen=True)
class _Filled:
    """What is filled, and how strictly."""

    state: GlobalState
    model: nn.Module | Sequence[nn.Module]
    optimizer: Optimizer | Sequence[Optimizer] | None
    scheduler: Any | None
    strict: bool
    only_progress: bool
    module_name: str | None
    loader: Any | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether only an adapter is trained, and in checkpoints."""
        return self.state.peft_config is not None


def _load(
    config: CheckpointConfig, filled: _Filled, runtime: Runtime, context: dict[str, Any] | None
) -> tuple[int, float]:
    for attempt in range(_ATTEMPTS):
        found = _found(config, runtime, context)
        if found is None:
            logger.info("nothing to load: training begins with the model as it is")
            return 0, 0
        try:
            return _load_found(found, config, filled, runtime)
        except (CheckpointNotFoundError, CollectiveError):
            # a training that goes on saving may have removed it: all ranks look again, and alike
            if attempt + 1 == _ATTEMPTS or _found(config, runtime, context) == found:
                raise
    raise CheckpointError(f"{config.load} changes faster than it can be loaded")


def _found(config: CheckpointConfig, runtime: Runtime, context: dict[str, Any] | None) -> Resolution | None:
    """Decide what is loaded. Collective."""
    local = local_manager_of(config, context) if config.load is not None else None
    latest = -1 if local is None else local.find_latest(runtime.control)
    found = resolve_together(config, runtime.control, local=latest)
    if found is not None and found.origin == "local" and local is not None:
        return replace(found, directory=str(local.path_of(found.iteration, runtime.global_rank)))
    return found


def _load_found(
    found: Resolution, config: CheckpointConfig, filled: _Filled, runtime: Runtime
) -> tuple[int, float]:
    if found.weights_only:
        _begin_from(found, filled, runtime)
        return 0, 0
    wanted = {"load_rng": config.load_rng, "module_name": filled.module_name}
    with opened(found, runtime, fall_back=config.fall_back, **wanted) as checkpoint:
        _resume(checkpoint, found, config, filled, runtime)
    progress = filled.state.train_state
    logger.info("resumed from %s, step %d", checkpoint.directory, progress.step)
    return progress.step, progress.floating_point_operations_so_far


def _begin_from(found: Resolution, filled: _Filled, runtime: Runtime) -> None:
    """Take the weights; step, optimizer and random numbers stay as they are."""
    if filled.only_progress:
        return
    with together(runtime.control, f"starting from {found.directory}"):
        model = ModelState(filled.model, is_init_step=filled.is_adapter)
    _load_model_weights_from_checkpoint(
        found.directory,
        model,
        dist_ckpt_strictness=filled.state.checkpoint_config.dist_ckpt_strictness,
        strict=filled.strict,
        runtime=runtime,
        transforms=filled.state.transforms,
    )
    logger.info("training begins with the weights of %s", found.directory)


def _resume(
    checkpoint: OpenedCheckpoint,
    found: Resolution,
    config: CheckpointConfig,
    filled: _Filled,
    runtime: Runtime,
) -> None:
    control = runtime.control
    has_optimizer = any(control.gather(filled.optimizer is not None, "asking who has an optimizer"))
    with together(control, f"comparing what is to be resumed with {checkpoint.directory}"):
        _check_kind(checkpoint, filled)
        with_optimizer = has_optimizer and _is_there(
            "optimizer", config.save_optim, config.load_optim, checkpoint
        )
        with_rng = _is_there("rng", config.save_rng, config.load_rng, checkpoint)
        rng_state = checkpoint.rng_state if with_rng else None
        loader_state = None if filled.loader is None else checkpoint.loader_state(runtime)
        model = ModelState(filled.model, is_peft=filled.is_adapter)
        optimizer = None
        if with_optimizer and filled.optimizer is not None:
            optimizer = OptimizerState(filled.model, filled.optimizer, filled.scheduler)
    if filled.is_adapter and config.pretrained_checkpoint is not None:
        base = resolve_together(CheckpointConfig(pretrained_checkpoint=config.pretrained_checkpoint), control)
        if base is not None:
            _begin_from(base, filled, runtime)
    if not filled.only_progress:
        _fill(checkpoint, found, model, optimizer, config, filled, runtime)
    with together(control, f"taking over the progress of {checkpoint.directory}"):
        if loader_state is not None:
            load_dataloader_state(filled.loader, loader_state, checkpoint.directory)
        if rng_state is not None:  # after the loader, which may draw numbers
            set_rng_state(rng_state)
        filled.state.train_state.load_state_dict(checkpoint.train_state.to_plain())


def _fill(
    checkpoint: OpenedCheckpoint,
    found: Resolution,
    model: ModelState,
    optimizer: OptimizerState | None,
    config: CheckpointConfig,
    filled: _Filled,
    runtime: Runtime,
) -> None:
    strictness = config.dist_ckpt_strictness if filled.strict else StrictHandling.LOG_ALL
    options: dict[str, Any] = {"transforms": filled.state.transforms, "strictness": strictness}
    if found.origin != "local":
        load_training_state(checkpoint.stored, model, optimizer, runtime=runtime, **options)
        return
    with together(runtime.control, f"loading {checkpoint.directory}"):
        alone = replace(
            runtime, global_rank=0, world_size=1, is_main_process=True, is_last_process=True, control=Solo()
        )
        load_training_state(checkpoint.stored, model, optimizer, runtime=alone, **options)


def _check_kind(checkpoint: OpenedCheckpoint, filled: _Filled) -> None:
    if bool(checkpoint.contents.get("adapter")) != filled.is_adapter:
        has = ("an adapter alone", "a whole model")
        found, wanted = has if checkpoint.contents.get("adapter") else has[::-1]
        raise CheckpointError(
            f"{checkpoint.directory} holds {found}, and {wanted} is to be resumed: "
            "GlobalState(peft_config=…) says which of the two it is"
        )


def _is_there(what: str, saved: bool, wanted: bool, checkpoint: OpenedCheckpoint) -> bool:
    """Return whether something is loaded; raise if it should be there and is not."""
    if not wanted or checkpoint.contents.get(what):
        return wanted
    option = {"optimizer": "optim", "rng": "rng"}[what]
    text = {"optimizer": "optimizer state", "rng": "random number generators"}[what]
    if saved:
        raise CheckpointError(
            f"{checkpoint.directory} was saved without {text}: to go on with fresh ones, pass "
            f"load_{option}=False"
        )
    logger.warning("%s was saved without %s: they stay as they are", checkpoint.directory, text)
    return False
