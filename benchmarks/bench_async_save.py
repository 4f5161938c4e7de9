"""For how long a save in the background blocks training, and what training loses while it is under way.

    python benchmarks/bench_async_save.py [--size-gb 0.5] [--folder DIR] [--rounds 7] [--workers thread,…]

The size is that of the weights, in bf16; Adam's two moments are as large again, each. Everything happens in
one process, as in a training. In each round a plain copy of all tensors into memory that has been used before
and a whole `save_checkpoint` follow each other, in turns; the ratio is that of a round. "Training" are steps
of a small network that needs one processor; "under way" is from the return of `save_checkpoint` until the
checkpoint counts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_training import bytes_of, make_state
from torch import nn

from sharded_ckpt.training.checkpointing import (
    AsyncCallsQueue,
    CheckpointConfig,
    GlobalState,
    maybe_finalize_async_save,
    save_checkpoint,
)


def main() -> None:
    """Measure every worker that was asked for, and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gb", type=float, default=0.5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", default="thread,process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, optimizer = make_state(options.size_gb)
    copies = [(tensor.detach(), torch.zeros_like(tensor)) for tensor in bytes_of(model, optimizer)]
    size = sum(tensor.nbytes for tensor, _ in copies) / 1e9
    print(
        f"### a save in the background: {size:.2f} GB, {len(copies)} tensors, medians of {options.rounds}\n"
    )
    print("| worker | copy s | blocked s | blocked x copy | under way s | training alone, steps/s | beside |")
    print("|---|---|---|---|---|---|---|")
    for worker in options.workers.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            print(measured(worker, Path(folder), model, optimizer, copies, options.rounds), flush=True)


def measured(
    worker: str,
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    copies: list[tuple[torch.Tensor, torch.Tensor]],
    rounds: int,
) -> str:
    """Return the row of one worker."""
    config = CheckpointConfig(save=folder, async_save=True, async_worker=worker, most_recent_k=1)
    step = training_step()
    figures: list[tuple[float, float, float, float, float]] = []
    with AsyncCallsQueue(worker=worker) as queue:
        state = GlobalState(config, async_calls_queue=queue)

        def save() -> None:
            state.train_state.step += 1
            save_checkpoint(state, model, optimizer, None, 0)

        def copy() -> None:
            for tensor, into in copies:
                into.copy_(tensor)

        save()  # allocates; a process starts
        maybe_finalize_async_save(state, config, blocking=True)
        for number in range(rounds):
            if number % 2:
                copying, blocked = seconds(copy), seconds(save)
            else:
                blocked, copying = seconds(save), 0.0
            began, beside = time.perf_counter(), 0
            while not queue.maybe_finalize_async_calls():
                step()
                beside += 1
            under_way = time.perf_counter() - began
            copying = copying or seconds(copy)
            alone = sum(1 for _ in during(min(under_way, 2.0), step)) / min(under_way, 2.0)
            figures.append((copying, blocked, under_way, alone, beside / under_way))
    ratio = statistics.median(blocked / copying for copying, blocked, *_ in figures)
    copying, blocked, under_way, alone, _ = (
        statistics.median(column) for column in zip(*figures, strict=True)
    )
    share = statistics.median(beside / alone for *_, alone, beside in figures)
    times = f"{copying:.3f} | {blocked:.3f} | {ratio:.2f} | {under_way:.2f}"
    return f"| {worker} | {times} | {alone:.0f} | {share:.0%} |"


def training_step() -> Callable[[], None]:
    """Return a step of a training whose tensors fit into the cache of a processor."""
    network = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    batch = torch.randn(64, 256)

    def step() -> None:
        network(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def during(limit: float, step: Callable[[], None]) -> list[None]:
    """Take steps until a time is over; return one item for each."""
    end, taken = time.perf_counter() + limit, []
    while time.perf_counter() < end:
        taken.append(step())
    return taken


def seconds(work: Callable[[], None]) -> float:
    """Return how long something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
