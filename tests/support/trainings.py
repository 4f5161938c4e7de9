"""Small trainings with checkpoints: of one layer in one process, and of a Llama over stages on ranks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharded_ckpt.training.checkpointing import (
    CheckpointConfig,
    GlobalState,
    load_checkpoint,
    save_checkpoint,
)
from support.pipelines import stage_of


class Training:
    """One layer, AdamW and a schedule; its batches are drawn from torch's own generator."""

    def __init__(self, config: CheckpointConfig, seed: int = 0, **state: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model: nn.Module = nn.Linear(4, 3)
        self.state = GlobalState(config, **state)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.9)
        self.losses: list[float] = []

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.state, self.model, self.optimizer, self.scheduler

    @property
    def step(self) -> int:
        return self.state.train_state.step

    def train(self, steps: int) -> Training:
        for _ in range(steps):
            loss = self.model(torch.randn(2, 4)).square().sum()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
            self.state.train_state.step += 1
            self.state.train_state.consumed_train_samples += 2
        return self

    def save(self, **options: Any) -> Training:
        save_checkpoint(*self.parts, 100 * self.step, **options)
        return self

    def load(self, **options: Any) -> tuple[int, float]:
        return load_checkpoint(*self.parts, **options)

    def everything(self) -> dict[str, Any]:
        """All that a resumed training must have in common with one that was never interrupted."""
        return {
            "model": {name: tensor.clone() for name, tensor in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random numbers": torch.get_rng_state(),
            "progress": self.state.train_state.to_plain(),
        }


def config_of(run: Path, **options: Any) -> CheckpointConfig:
    """A training that resumes itself."""
    return CheckpointConfig(**{"save": run, "load": run, "durable": False, **options})


def equal(one: Any, other: Any) -> bool:
    """Whether two values are the same, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


# Over ranks ------------------------------------------------------------------------------------------------


class PipelineTraining(Training):
    """A Llama over the ranks' stages. Batches are drawn from torch's generator, or known by their step."""

    def __init__(
        self,
        checkpoint: Path,
        config: CheckpointConfig,
        *,
        drawn: bool = True,
        timeout: float = 60.0,
        **state: Any,
    ) -> None:
        self.stage = stage_of(checkpoint, materialize=True, timeout=timeout)
        self.model = self.stage.shard
        self.state = GlobalState(config, runtime=self.stage.runtime, **state)
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-2) if parameters else None  # type: ignore[assignment]
        made = self.optimizer is not None
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.9) if made else None  # type: ignore[assignment]
        self.drawn = drawn
        self.losses = []

    def train(self, steps: int) -> PipelineTraining:
        for _ in range(steps):
            generator = None if self.drawn else torch.Generator().manual_seed(self.step)
            ids = torch.randint(3, 128, (4, 8), generator=generator)
            loss = self.stage.train_step({"input_ids": ids, "labels": ids}, micro_batches=2)
            for part in filter(None, (self.optimizer, self.scheduler)):
                part.step()
            self.model.zero_grad()
            self.losses.append(loss.item())
            self.state.train_state.step += 1
            self.state.train_state.consumed_train_samples += 4
        return self

    def everything(self) -> dict[str, Any]:
        """By name: weights and optimizer state; and all else of this rank."""
        slots = {
            f"{slot} of {name}": value.clone()
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            for slot, value in (self.optimizer.state[parameter] if self.optimizer else {}).items()
        }
        return {
            "tensors": {**{n: t.clone() for n, t in self.model.state_dict().items()}, **slots},
            "lr": [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else [],
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "random numbers": torch.get_rng_state(),
            "progress": self.state.train_state.to_plain(),
        }


def train_save_train(
    checkpoint: Path, config: CheckpointConfig, steps: Iterable[int], drawn: bool = True
) -> tuple[Any, Any, list[float]]:
    """Train, save, train on without a break; return everything at the save and at the end, and the losses."""
    torch.manual_seed(100)
    first, second = steps
    training = PipelineTraining(checkpoint, config, drawn=drawn).train(first)
    at_save = training.save().everything()
    training.train(second)
    return at_save, training.everything(), training.losses[first:]


def resume_and_train(
    checkpoint: Path, config: CheckpointConfig, steps: int, drawn: bool = True
) -> tuple[Any, Any, list[float], tuple[int, float]]:
    """Load, train on; return everything after the load and at the end, and the losses."""
    torch.manual_seed(7)
    training = PipelineTraining(checkpoint, config, drawn=drawn)
    loaded = training.load()
    at_load = training.everything()
    training.train(steps)
    return at_load, training.everything(), training.losses, loaded
