"""What a save and a load are given: everything of a training that a checkpoint is about, and the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from patchers.errors import ConfigError
from sharded_ckpt.runtime import Runtime, as_runtime, default_runtime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from torch.optim import Optimizer

    from sharded_ckpt.training.checkpointing.train_state import GlobalState


class CheckpointType(Enum):
    """Where a checkpoint is, and who reads it."""

    LOCAL = auto()
    """On a disk of each rank; only the same ranks read it."""
    GLOBAL = auto()
    """In a directory that all ranks share; any number of ranks reads it."""
    FSDP_DTENSOR = auto()
    """The same, in the format of torch DCP."""


@dataclass
class CheckpointSaveContext:
    """Everything that a save needs.

    Attributes:
        state: Config, step, async saves in flight.
        model: The model of this rank, or its parts.
        optimizer: None on ranks that train nothing.
        opt_param_scheduler: The learning-rate scheduler, if there is one.
        num_floating_point_operations_so_far: Of the whole training.
        train_data_iterator: If it has a state, that is saved.
        non_persistent_ckpt: Whether the checkpoint is a short-lived one.
        pg_collection: The ranks that share the model; all of them if None.
        module_name: Sets apart the random numbers of one of several models.
    """

    state: GlobalState
    model: Sequence[nn.Module] | nn.Module
    optimizer: Optimizer | Sequence[Optimizer] | None
    opt_param_scheduler: Any | None
    num_floating_point_operations_so_far: float
    train_data_iterator: Any | None = None
    non_persistent_ckpt: bool = False
    pg_collection: Any | None = None
    module_name: str | None = None


@dataclass
class CheckpointLoadContext:
    """Everything that a load needs.

    Attributes:
        state: Config and step; the step is what comes out of the checkpoint.
        model: The model of this rank, or its parts, to be filled.
        optimizer: None on ranks that train nothing.
        opt_param_scheduler: The learning-rate scheduler, if there is one.
        strict: Whether names that the checkpoint or the model lacks are errors.
        skip_load_to_model_and_opt: Take only the step, the random numbers and the place in the data.
        pg_collection: The ranks that share the model; all of them if None.
        module_name: Sets apart the random numbers of one of several models.
        train_data_iterator: If it has a state, it is put where it was.
    """

    state: GlobalState
    model: Sequence[nn.Module] | nn.Module
    optimizer: Optimizer | Sequence[Optimizer] | None
    opt_param_scheduler: Any | None
    strict: bool = True
    skip_load_to_model_and_opt: bool = False
    pg_collection: Any | None = None
    module_name: str | None = None
    train_data_iterator: Any | None = None


def runtime_of(state: GlobalState, pg_collection: Any = None) -> Runtime:
    """Return the ranks that share the model.

    Args:
        state: May say so as `runtime`.
        pg_collection: A process group, or an object with one as `process_group`.

    Raises:
        ConfigError: It is something else.
    """
    if pg_collection is None:
        return as_runtime(state.runtime)
    from torch.distributed import ProcessGroup

    group = getattr(pg_collection, "process_group", pg_collection)
    if not isinstance(group, ProcessGroup):
        raise ConfigError(
            f"pg_collection is a {type(pg_collection).__name__}; pass the process group of the ranks that "
            "share the model, an object with it as `process_group`, or None for all ranks"
        )
    return default_runtime(process_group=group)
