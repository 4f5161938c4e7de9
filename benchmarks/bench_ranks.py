"""Four ranks that load a model together, beside four processes that load all of it each.

    python benchmarks/bench_ranks.py [--size-gb 4] [--folder DIR] [--rounds 5] [--ranks 4]

The parent imports everything; ranks are forks of it, joined by gloo. A figure is that of the slowest rank,
all weights touched, from a common start. RSS counts the pages of the files in every rank that maps them, PSS
counts each page once. Ways alternate; the folder must lie on a disk for the cold figures.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_read import make_dense
from paired import _read, evict, run_apart, settle, warm
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama as modeling_llama
from transformers.utils import logging as transformers_logging

import sharded_ckpt.checkpoint.transfer
import sharded_ckpt.loading.opening  # noqa: F401  # what the verbs import only when they are called
from sharded_ckpt import default_runtime, load_and_shard_model

MB = 1e6


def together(folder: Path) -> torch.nn.Module:
    """Load the blocks that this rank is dealt."""
    return load_and_shard_model("auto", folder, runtime=default_runtime(device="cpu"))


def each_for_itself(folder: Path) -> torch.nn.Module:
    """Load everything, as `from_pretrained` does on every rank."""
    return AutoModelForCausalLM.from_pretrained(folder)


WAYS: dict[str, Callable[[Path], torch.nn.Module]] = {"ours": together, "from_pretrained": each_for_itself}


def memory(field: str) -> float:
    """Return a figure of this process's memory, in MB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")) / MB


def rank_of(rank: int, ranks: int, way: str, folder: Path, store: str, results: Any) -> None:
    """Load as one rank, and say how long it took and what it holds."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    settle()
    before = {field: memory(field) for field in ("Rss", "Pss")}
    distributed.barrier()
    started = time.perf_counter()
    model = WAYS[way](folder)
    loaded = time.perf_counter() - started
    for tensor in {id(tensor): tensor for tensor in model.parameters()}.values():
        _read(tensor)
    total = time.perf_counter() - started
    distributed.barrier()
    results.put({"load": loaded, "total": total, **{f: memory(f) - before[f] for f in before}})
    distributed.barrier()


def run(way: str, folder: Path, ranks: int) -> dict[str, float]:
    """Run all ranks once; times are the slowest rank's, memory is the sum."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = (ranks, way, folder, f"{scratch}/store", results)
        processes = [context.Process(target=rank_of, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        found = [results.get() for _ in processes]
        for process in processes:
            process.join()
    times = {name: max(one[name] for one in found) for name in ("load", "total")}
    return {**times, **{name: sum(one[name] for one in found) for name in ("Rss", "Pss")}}


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gb", type=float, default=4.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_dense(options.folder or Path(scratch), options.size_gb)
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) / MB
        print(f"{size:.0f} MB in {len(files)} files, {options.ranks} ranks, {options.rounds} rounds\n")
        warm(files)
        print(compare("warm", folder, options, lambda: None), flush=True)
        print(compare("cold", folder, options, lambda: evict(files)), flush=True)


def compare(title: str, folder: Path, options: argparse.Namespace, prepare: Callable[[], None]) -> str:
    """Let the ways alternate, and return a table of medians."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(options.rounds + 1):
        for way in list(WAYS)[:: 1 if number % 2 else -1]:
            prepare()
            result = run_apart(lambda way=way: run(way, folder, options.ranks))
            if number:  # the first round warms up
                runs[way].append(result)
    lines = [f"### {title}", "", "| way | load s | with touch s | x ours | sum RSS MB | sum PSS MB |"]
    lines.append("|---|---|---|---|---|---|")
    for way, found in runs.items():
        ratio = statistics.median(a["total"] / b["total"] for a, b in zip(found, runs["ours"], strict=True))
        median = {name: statistics.median(one[name] for one in found) for name in found[0]}
        lines.append(
            f"| {way} | {median['load']:.3f} | {median['total']:.3f} | {ratio:.2f} "
            f"| {median['Rss']:.0f} | {median['Pss']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
