"""How far above its own bytes a rank peaks while it loads a quarter of a model.

    python benchmarks/bench_load_memory.py [--size-gb 1] [--folder DIR] [--rounds 3]

Each run is a fresh process that imports everything first. Its peak is VmHWM after a reset through
`/proc/self/clear_refs`, less the resident memory after the imports; all owned weights are touched.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sharded_ckpt.checkpoint.transfer
import sharded_ckpt.loading.opening  # noqa: F401  # part of the imports, not of the load
from sharded_ckpt import load_and_shard_model

MB = 1e6


def status(field: str) -> int:
    """Return a memory figure of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def make_checkpoint(folder: Path, size: float) -> None:
    """Write a bf16 llama of about `size` bytes."""
    hidden, layers = 1024, 16
    per_layer = 4 * hidden * hidden + 3 * hidden * 4 * hidden
    layers = max(4, int(size / 2 / per_layer) // 4 * 4)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="200MB")


def measure(load: Callable[[], torch.nn.Module]) -> tuple[int, int]:
    """Load and touch a model; return its own bytes, and the peak of this process over what it had before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model = load()
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    for tensor in tensors:
        tensor.detach().view(torch.uint8).view(-1)[::4096].sum()
    return sum(tensor.nbytes for tensor in tensors), status("VmHWM") - before


def run(way: str, folder: Path) -> tuple[int, int]:
    """Measure one way to load in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_run_here, args=(way, folder, queue))
    process.start()
    result: tuple[int, int] = queue.get()
    process.join()
    return result


def _run_here(way: str, folder: Path, queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put(measure(lambda: WAYS[way](folder, _quarter(folder))))


def _quarter(folder: Path) -> set[int]:
    layers = LlamaConfig.from_pretrained(folder).num_hidden_layers
    return set(range(layers // 4, layers // 2))


WAYS: dict[str, Callable[[Path, set[int]], torch.nn.Module]] = {
    "a quarter": lambda f, owned: load_and_shard_model("auto", f, owned),
    "a quarter, cast to fp16": lambda f, owned: load_and_shard_model("auto", f, owned, dtype=torch.float16),
    "a quarter, materialised": lambda f, owned: load_and_shard_model("auto", f, owned, materialize=True),
    "a quarter, converted": lambda f, owned: load_and_shard_model("auto", f, owned, route="converted"),
    "from_pretrained, all": lambda f, owned: AutoModelForCausalLM.from_pretrained(f),
}


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--size-gb", type=float, default=1.0)
    arguments.add_argument("--folder", type=Path)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not (folder / "config.json").exists():
            make_checkpoint(folder, options.size_gb * 1e9)
        report(folder, options.rounds)


def report(folder: Path, rounds: int) -> None:
    """Print a line for each way to load."""
    print(f"{'':26s}{'own MB':>10s}{'peak MB':>10s}{'peak - own':>12s}")
    for way in WAYS:
        runs = [run(way, folder) for _ in range(rounds)]
        own, peak = runs[0][0], statistics.median(peak for _, peak in runs)
        print(f"{way:26s}{own / MB:10.1f}{peak / MB:10.1f}{(peak - own) / MB:12.1f}", flush=True)


if __name__ == "__main__":
    main()
