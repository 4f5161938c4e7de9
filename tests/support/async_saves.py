"""Trainings that are saved in the background, down to the storage, with ranks that wait, fail or die."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from patchers.errors import CollectiveError
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.checkpoint.storage import LocalStorage
from sharded_ckpt.runtime import default_runtime
from sharded_ckpt.training import ModelState, OptimizerState, StagedState, load_training_state
from sharded_ckpt.training.checkpointing import AsyncCallsQueue, AsyncRequest
from sharded_ckpt.training.checkpointing.hf_export import HFExport
from support.storages import WatchedStorage
from support.training import adam_of, train

WAIT = 30.0


class GatedStorage(WatchedStorage):
    """Waits before it creates a file of tensors, until it is let go on."""

    def __init__(self) -> None:
        super().__init__(durable=False)
        self.reached, self.go_on = threading.Event(), threading.Event()

    def create(self, path: Any) -> int:
        if str(path).endswith(".safetensors"):
            self.reached.set()
            assert self.go_on.wait(WAIT)
        return super().create(path)


class BrokenStorage(LocalStorage):
    """Cannot create files of tensors."""

    def create(self, path: Any) -> int:
        if str(path).endswith(".safetensors"):
            raise OSError(28, "No space left on device", str(path))
        return super().create(path)


def made(name: str = "") -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model that has trained one step; parameters have the name before theirs."""
    model = nn.ModuleDict({f"{name}a": nn.Linear(30, 20), f"{name}b": nn.Linear(20, 10, bias=False)})
    optimizer = adam_of(model)
    assert optimizer is not None
    train(model, [optimizer], [0])
    return model, optimizer


def request_for(
    directory: Path,
    training: tuple[nn.Module, torch.optim.Optimizer],
    queue: AsyncCallsQueue | None = None,
    storage: LocalStorage | None = None,
    finalizers: Sequence[Any] = (),
    export: HFExport | None = None,
) -> AsyncRequest:
    """What `save_checkpoint` does, without its directories and trackers."""
    control = queue.control if queue else default_runtime().control
    staged = StagedState.gather(ModelState(training[0]), OptimizerState(*training), control)
    staged = staged.with_export(export)
    staged = staged if queue is None else queue.snapshot(staged)
    stack = ExitStack()
    save = stack.enter_context(transaction(directory, control, durable=False, storage=storage))

    def conclude(result: Any, error: BaseException | None) -> None:
        with stack:
            if error is not None:
                raise error

    return AsyncRequest(staged.write, (save,), list(finalizers), conclude=conclude, directory=str(directory))


def save(directory: Path, training: Any, queue: AsyncCallsQueue, **options: Any) -> int:
    return queue.schedule_async_request(request_for(directory, training, queue, **options))


def values_of(training: tuple[nn.Module, torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    model, optimizer = training
    slots = OptimizerState(model, optimizer).tensors()
    return {name: value.clone() for name, value in {**model.state_dict(), **slots}.items()}


def loaded(directory: Path, like: str = "") -> dict[str, torch.Tensor]:
    training = made(like)
    load_training_state(directory, training[0], OptimizerState(*training))
    return values_of(training)


def spoil(training: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    """Change all of it in place, as a step that comes after the save would."""
    with torch.no_grad():
        for tensor in (*training[0].parameters(), *OptimizerState(*training).tensors().values()):
            tensor.fill_(7.0)


# On ranks ---------------------------------------------------------------------------------------------------


def fail_on_the_last_rank(parent: str) -> list[Any]:
    """Fail one save on the last rank; each rank tells what it is told, then all save well."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    training = made(f"rank{rank}")
    storage = BrokenStorage(durable=False) if rank == last else None
    with AsyncCallsQueue() as queue:
        save(Path(parent) / "bad", training, queue, storage=storage)
        try:
            queue.maybe_finalize_async_calls(blocking=True)
            said = "nothing"
        except CollectiveError as error:
            said = str(error)
        return [said, *save_well(parent, queue, training)]


def save_by_processes(parent: str) -> list[Any]:
    """Save on all ranks, each with a process that writes."""
    with AsyncCallsQueue(worker="process") as queue:
        return save_well(parent, queue, made(f"rank{dist.get_rank()}"))


def save_well(parent: str, queue: AsyncCallsQueue, training: Any) -> list[Any]:
    """Save, change everything, load what was saved into others; tell what differs."""
    expected = values_of(training)
    save(Path(parent) / "good", training, queue)
    spoil(training)
    queue.maybe_finalize_async_calls(blocking=True)
    found = loaded(Path(parent) / "good", f"rank{dist.get_rank()}")
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


def wait_for_the_slowest(parent: str) -> list[Any]:
    """Poll while rank 1 still writes; tell what each poll gave, and whether anything was there."""
    rank, storage = dist.get_rank(), GatedStorage()
    if rank != 1:
        storage.go_on.set()
    with AsyncCallsQueue() as queue:
        save(Path(parent) / "new", made(f"rank{rank}"), queue, storage=storage)
        assert storage.reached.wait(WAIT)
        polls = [(queue.maybe_finalize_async_calls(), (Path(parent) / "new").exists()) for _ in range(3)]
        storage.go_on.set()
        while not (done := queue.maybe_finalize_async_calls()):
            time.sleep(0.01)
    return [polls, done, (Path(parent) / "new").exists()]


def die_while_saving(parent: str) -> list[Any]:
    """Save, then lose the last rank while it writes the next one; the others tell what they are told."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    control = default_runtime(timeout=8.0).control
    training, storage = made(f"rank{rank}"), GatedStorage()
    with AsyncCallsQueue(control) as queue:
        save(Path(parent) / "first", training, queue)
        queue.maybe_finalize_async_calls(blocking=True)
        save(Path(parent) / "second", training, queue, storage=storage)
        assert storage.reached.wait(WAIT)
        if rank == last:
            os.kill(os.getpid(), signal.SIGKILL)
        storage.go_on.set()
        try:
            queue.maybe_finalize_async_calls()
            said = "nothing"
        except CollectiveError as error:
            said = str(error)
        names = [name for name in os.listdir(parent) if not name.startswith(".")]
        return [said, queue.get_num_unfinalized_calls(), names]


def load_first(parent: str) -> None:
    """Load what was saved before a rank died; its values are those that the ranks had."""
    name = f"rank{dist.get_rank()}"
    expected = values_of(made(name))
    assert all(torch.equal(value, expected[n]) for n, value in loaded(Path(parent) / "first", name).items())
