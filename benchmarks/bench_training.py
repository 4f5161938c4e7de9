"""How fast the state of a training (weights and Adam) is saved and loaded, beside DCP's own format.

    python benchmarks/bench_training.py [--size-gb 1] [--folder DIR] [--rounds 5] [--only save,load,ranks]

The size is that of the weights, in bf16; Adam's two moments are as large again, each. Both sides save the
same bytes and are done when these are on the disk; both fill a model and an optimizer that are there. Loads
are warm. With `ranks`, two ranks hold half of the weights each. How it is measured: `benchmarks/paired.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from bench_write import make_ready, make_tensors, raw_direct
from paired import compare, run_apart, settle, table, warm
from torch import nn

from sharded_ckpt.training import ModelState, OptimizerState, load_training_state, save_training_state


def main() -> None:
    """Run the comparisons that were asked for and print their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gb", type=float, default=1.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="save,load,ranks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.9, help="of a processor, that a fair run has had")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    torch.set_num_threads(1)  # those of the parent would be missing in its forks
    model, optimizer = make_state(options.size_gb)
    size = sum(tensor.nbytes for tensor in bytes_of(model, optimizer)) / 1e9
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        if "save" in options.only:
            run = folder / "run"
            save = {
                "save_training_state": ours,
                "DCP": theirs,
                "DCP, 2 threads": partial(theirs, threads=2),
                "raw O_DIRECT writes, 8 threads": raw,
            }
            methods = {name: partial(method, run, model, optimizer) for name, method in save.items()}
            ready = partial(make_ready, run, round(2 * size * 1e9))
            measures = compare(methods, options.rounds, prepare=ready, touch=False, share=options.share)
            print(table(f"save, durable: {size:.2f} GB", measures), flush=True)
            shutil.rmtree(run)
        if "ranks" in options.only:
            print(over_ranks(folder / "ranks", options), flush=True)
        if "load" in options.only:
            run_apart(partial(write_both, folder, model, optimizer))
            load = {
                "load_training_state": partial(load_ours, folder / "ours", model, optimizer),
                "DCP": partial(load_theirs, folder / "dcp", model, optimizer),
            }
            files = [path for path in folder.rglob("*") if path.is_file()]
            measures = compare(
                load, options.rounds, prepare=partial(warm, files), touch=False, share=options.share
            )
            print(table(f"load, warm: {size:.2f} GB into what is there", measures), flush=True)


def over_ranks(folder: Path, options: argparse.Namespace) -> str:
    """Let ranks that hold a share of the state each save it together; the slowest rank counts."""
    share = options.size_gb / options.ranks
    ways: dict[str, list[float]] = {"save_training_state": [], "DCP": []}
    for number in range(options.rounds + 1):
        for way in list(ways)[:: 1 if number % 2 else -1]:
            make_ready(folder, round(2 * 3 * options.size_gb * 1e9))
            seconds = max(run_together(partial(save_share, folder, way, share), options.ranks))
            if number:  # the first round warms up
                ways[way].append(seconds)
    shutil.rmtree(folder)
    ours = ways["save_training_state"]
    lines = [f"### save, durable, by {options.ranks} ranks", "", "| way | s | x ours |", "|---|---|---|"]
    for way, seconds in ways.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, ours, strict=True))
        lines.append(f"| {way} | {statistics.median(seconds):.3f} | {ratio:.2f} |")
    return "\n".join(lines) + f"\n\n{options.rounds} rounds.\n"


def run_together(work: Callable[[int], float], ranks: int) -> list[float]:
    """Return what each of some forks, joined by gloo, measured."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as scratch:

        def rank_of(rank: int) -> None:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=ranks
            )
            results.put(work(rank))
            torch.distributed.barrier()

        processes = [context.Process(target=rank_of, args=(rank,)) for rank in range(ranks)]
        for process in processes:
            process.start()
        found = [results.get() for _ in processes]
        for process in processes:
            process.join()
    return found


def save_share(folder: Path, way: str, size_gb: float, rank: int) -> float:
    """Save as one rank, and return how long it took from a common start."""
    model, optimizer = make_state(size_gb)
    stage = nn.ModuleDict({f"stage{rank}": model})
    settle()
    torch.distributed.barrier()
    started = time.perf_counter()
    if way == "DCP":
        dcp.save(state_of(stage, optimizer), checkpoint_id=folder / "out")
    else:
        ours(folder, stage, optimizer)
    return time.perf_counter() - started


def make_state(size_gb: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model of random bits, and an optimizer that has taken a step."""
    model = nn.Module()
    for name, tensor in make_tensors(size_gb).items():
        module = model
        for part in name.split(".")[:-1]:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.weight = nn.Parameter(tensor)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for parameter in model.parameters():
        parts = {slot: parameter.detach().roll(1) for slot in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **parts}
    return model, optimizer


def bytes_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return every tensor of the state."""
    slots = [value for state in optimizer.state.values() for value in state.values()]
    return [*model.parameters(), *slots]


def write_both(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Write what is to be loaded. Not in the parent: it must start no threads."""
    ours(folder / "ours", model, optimizer)
    theirs(folder / "dcp", model, optimizer)
    check(folder / "ours", model, optimizer)
    return {}


def check(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what we have saved, before any time is taken."""
    expected = [tensor.detach().clone() for tensor in bytes_of(model, optimizer)]
    with torch.no_grad():
        for tensor in bytes_of(model, optimizer):
            tensor.zero_()
    load_ours(folder, model, optimizer)
    pairs = zip(bytes_of(model, optimizer), expected, strict=True)
    if not all(
        torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in pairs if one.dim()
    ):
        sys.exit("what was loaded is not what was saved")


# Methods


def ours(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Save by `save_training_state`."""
    save_training_state(folder / "out", model, OptimizerState(model, optimizer))
    return []


def theirs(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, threads: int = 1
) -> list[torch.Tensor]:
    """Save by DCP, to its own format; it waits for the disk by itself."""
    writer = dcp.FileSystemWriter(folder / "out", thread_count=threads)
    dcp.save(state_of(model, optimizer), storage_writer=writer, no_dist=True)
    return []


def raw(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Write as many bytes past the page cache: what the disk gives."""
    raw_direct(folder, {str(number): tensor for number, tensor in enumerate(bytes_of(model, optimizer))})
    return []


def load_ours(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Load by `load_training_state`."""
    load_training_state(folder / "out", model, OptimizerState(model, optimizer))
    return []


def load_theirs(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Load by DCP, which fills tensors in their places."""
    dcp.load(state_of(model, optimizer), checkpoint_id=folder / "out", no_dist=True)
    return []


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state under the same names for both, tensors alone."""
    return {"model": ModelState(model).state_dict(), "optim": OptimizerState(model, optimizer).tensors()}


if __name__ == "__main__":
    main()
