"""How far a training has come, and what belongs to it besides model and optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

import torch

from patchers.errors import CheckpointError
from sharded_ckpt.runtime import as_runtime

if TYPE_CHECKING:
    from sharded_ckpt.checkpoint.coordinator import Coordinator
    from sharded_ckpt.runtime import Runtime
    from sharded_ckpt.training.checkpointing.async_calls import AsyncCallsQueue
    from sharded_ckpt.training.checkpointing.config import CheckpointConfig
    from sharded_ckpt.training.transforms import StateDictTransforms

_DTYPES: Final = {"int": torch.int64, "float": torch.float64, "bool": torch.bool}


@dataclass
class TrainState:
    """How far a training has come. It is a `Stateful`, and plain data.

    Attributes:
        step: Optimizer steps taken.
        consumed_train_samples: Samples trained on.
        skipped_train_samples: Samples passed over.
        consumed_valid_samples: Samples validated on.
        floating_point_operations_so_far: All ranks together.
        do_train: Whether the run trains.
        do_valid: Whether the run validates.
        do_test: Whether the run tests.

    Example:
        >>> state = TrainState(step=3, consumed_train_samples=96)
        >>> TrainState.from_plain(state.to_plain(), "train_state.json") == state
        True
        >>> state.state_dict()["floating_point_operations_so_far"].dtype
        torch.float64
    """

    step: int = 0
    consumed_train_samples: int = 0
    skipped_train_samples: int = 0
    consumed_valid_samples: int = 0
    floating_point_operations_so_far: float = 0
    do_train: bool = False
    do_valid: bool = False
    do_test: bool = False

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return one tensor without dimensions for each field, as Megatron-Bridge does."""
        return {one.name: torch.tensor(getattr(self, one.name), dtype=_DTYPES[one.type]) for one in _fields()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over every field; it is all there, or nothing is changed.

        Args:
            state_dict: As `state_dict` gives it, or `to_plain`.

        Raises:
            CheckpointError: A field is missing or unknown, or is no number.
        """
        numbers = {
            name: value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            for name, value in state_dict.items()
        }
        vars(self).update(vars(self.from_plain(numbers, "the state of a training")))

    def to_plain(self) -> dict[str, Any]:
        """Return the fields as plain data: what train_state.json has, exactly."""
        return {one.name: getattr(self, one.name) for one in _fields()}

    @classmethod
    def from_plain(cls, plain: Any, where: str) -> TrainState:
        """Return the state that `to_plain` was called on.

        Args:
            plain: The content of train_state.json.
            where: The file, for errors.

        Raises:
            CheckpointError: A field is missing or unknown, or is no number.
        """
        if not isinstance(plain, Mapping):
            raise CheckpointError(f"{where}: expected an object with the fields of a TrainState")
        names = {one.name for one in _fields()}
        if odd := [f"no {name}" for name in sorted(names - set(plain))]:
            raise CheckpointError(f"{where} is not the state of a training: it has {', '.join(odd)}")
        if unknown := sorted(set(plain) - names):
            raise CheckpointError(f"{where} has fields that are not known here: {', '.join(unknown)}")
        return cls(**{one.name: _number(one.type, plain[one.name], one.name, where) for one in _fields()})


@dataclass
class GlobalState:
    """What a training carries besides model, optimizer and scheduler.

    Attributes:
        cfg: The `CheckpointConfig`, or the config of the whole run, which has it as `checkpoint`.
        train_state: How far the training has come.
        async_calls_queue: What saves while training goes on; None to save in the foreground.
        tokenizer: Saved beside the model.
        tokenizer_config: Says which files a tokenizer is made of that transformers does not know.
        runtime: Where we are. By default torch.distributed says, or this is the only process.
        transforms: What turns the model's tensors into those in files.
        peft_config: If only adapters are saved: says which names are theirs. See
            `apply_peft_adapter_filter_to_state_dict`.

    Example:
        >>> GlobalState(None).train_state.step
        0
    """

    cfg: Any
    train_state: TrainState = field(default_factory=TrainState)
    async_calls_queue: AsyncCallsQueue | None = None
    tokenizer: Any = None
    tokenizer_config: Any = field(default=None, kw_only=True)
    runtime: Runtime | Any = field(default=None, kw_only=True)
    transforms: StateDictTransforms | None = field(default=None, kw_only=True)
    peft_config: Any = field(default=None, kw_only=True)

    @property
    def checkpoint_config(self) -> CheckpointConfig:
        """What is said of checkpoints."""
        config: CheckpointConfig = getattr(self.cfg, "checkpoint", self.cfg)
        return config

    @property
    def control(self) -> Coordinator:
        """All ranks that train."""
        return as_runtime(self.runtime).control


def _get_train_state_from_state_dict(state_dict: Mapping[str, Any]) -> TrainState:
    """Return how far a training of Megatron-LM had come, by its checkpoint.

    Args:
        state_dict: With `iteration`, `args` (a namespace or a dict with `consumed_train_samples` and the
            like) and `num_floating_point_operations_so_far`; what is missing counts as 0.

    Example:
        >>> _get_train_state_from_state_dict({"iteration": 7, "args": {"consumed_train_samples": 56}}).step
        7
    """
    args = state_dict.get("args")
    said = args if isinstance(args, Mapping) else vars(args) if args is not None else {}
    samples = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    plain = {
        **TrainState().to_plain(),
        "step": state_dict.get("iteration", 0),
        **{name: said.get(name) or 0 for name in samples},
        "floating_point_operations_so_far": state_dict.get("num_floating_point_operations_so_far") or 0,
    }
    return TrainState.from_plain(plain, "a checkpoint of Megatron-LM")


def _fields() -> Any:
    return fields(TrainState)


def _number(kind: str, value: Any, name: str, where: str) -> Any:
    wanted = {"int": (int,), "float": (int, float), "bool": (bool,)}[kind]
    if not isinstance(value, wanted) or (kind != "bool" and isinstance(value, bool)):
        raise CheckpointError(f"{where}: {name} is {value!r}, expected {kind}")
    if kind != "bool" and value < 0:
        raise CheckpointError(f"{where}: {name} is {value!r}, less than 0")
    return value
