"""Two gloo ranks run one llama: this library's pipeline beside that of transformers itself.

Both sit in the same two processes, with one thread each, and take turns; every turn begins together. The
bound is what the hardware gives: the two processes run the whole model side by side, independently, at the
sizes of the micro-batches. Rounds in which a process waited for a processor for more than a tenth of its
running time are discarded.

    python benchmarks/bench_pipeline.py --cases prefill 1 8 64 128
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig
from transformers.generation import BaseStreamer

from sharded_ckpt import PipelineStage, default_runtime, load_and_shard_model
from sharded_ckpt.pipeline.micro_batches import rows_of_step

CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
PROMPT = {1: 32, 8: 32, 64: 8, 128: 8}
STEPS = 16
PREFILL = (8, 256)


class Clock(BaseStreamer):
    """Notes when each step has its tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note that a step is done."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to be noted."""

    def seconds_a_step(self) -> float:
        """The first two are the prompt's own and the token of the prefill."""
        first, *_, last = self.times[1:]
        return (last - first) / (len(self.times) - 2)


def generating(generate: Callable[..., Any], ids: torch.Tensor, **options: Any) -> Callable[[], float]:
    """Return what decodes once, and returns the seconds of a step."""

    def run() -> float:
        clock = Clock()
        options_ = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": STEPS + 1}
        generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options_, **options)
        return clock.seconds_a_step()

    return run


def calling(call: Callable[..., Any], ids: torch.Tensor, **options: Any) -> Callable[[], float]:
    """Return what runs the prompts once, and returns its seconds."""

    def run() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            call(input_ids=ids, use_cache=False, logits_to_keep=1, **options)
        return time.perf_counter() - began

    return run


def waited() -> tuple[float, float]:
    """Return for how many seconds this process has run, and waited for a processor."""
    run, wait, _ = Path("/proc/self/schedstat").read_text().split()
    return int(run) / 1e9, int(wait) / 1e9


def rounds(methods: dict[str, Callable[[], float]], count: int) -> dict[str, float]:
    """Return the median of every method over the rounds in which no rank was kept waiting."""
    found: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(-1, 3 * count):
        ran, stood = waited()
        seconds = {}
        for name in list(methods) if number % 2 else list(methods)[::-1]:
            dist.barrier()
            seconds[name] = methods[name]()
        ran, stood = waited()[0] - ran, waited()[1] - stood
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, (stood / (ran + stood), seconds))
        if number < 0 or max(share for share, _ in said) > 0.1:
            continue  # the first one warms up
        for name in methods:
            found[name].append(max(each[name] for _, each in said))
        if len(found[name]) == count:
            break
    return {name: statistics.median(values) for name, values in found.items()} if found[name] else {}


def rank_main(rank: int, folder: str, cases: list[str], count: int) -> None:
    """Measure all cases on one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    runtime = default_runtime(device="cpu")
    stage = PipelineStage(load_and_shard_model("auto", f"{folder}/model", runtime=runtime), runtime)
    config = DistributedConfig(pp_size=2)
    native = AutoModelForCausalLM.from_pretrained(f"{folder}/model", distributed_config=config).eval()
    whole = AutoModelForCausalLM.from_pretrained(f"{folder}/model").eval()
    for case in cases:
        torch.manual_seed(0)
        if case == "prefill":
            batch, length = PREFILL
            ids = torch.randint(4, 32000, (batch, length))
            methods = {
                "ours": calling(stage, ids, micro_batches=4),
                "native": calling(native, ids),
                "alone of 2 rows": calling(whole, ids[:2]),
            }
            tokens, rows = batch * length, [2] * 4
        else:
            batch, length = int(case), PROMPT[int(case)]
            ids = torch.randint(4, 32000, (batch, length))
            with torch.no_grad():
                rows = rows_of_step(stage, batch, length)
            methods = {
                "ours": generating(stage.generate, ids, micro_batches=rows),
                "native": generating(native.generate, ids),
            }
            methods |= {f"alone of {r} rows": generating(whole.generate, ids[:r]) for r in sorted({*rows})}
            tokens = batch
        medians = rounds(methods, count)
        if rank == 0:
            report(case, tokens, rows, medians)
    dist.destroy_process_group()


def report(case: str, tokens: int, rows: list[int], medians: dict[str, float]) -> None:
    """Print tokens a second of both, and of the two processes side by side."""
    if not medians:
        print(json.dumps({"case": case, "rows": rows, "fair rounds": 0}), flush=True)
        return
    ours, native = tokens / medians["ours"], tokens / medians["native"]
    bound = 2 * tokens / sum(medians[f"alone of {r} rows"] for r in rows)
    figures = {"ours": ours, "native": native, "ratio": ours / native, "of the bound": ours / bound}
    told = {name: round(value, 2) for name, value in figures.items()}
    print(json.dumps({"case": case, "rows": rows, **told}), flush=True)


def main() -> None:
    """Write the model, and start both ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["prefill", "1", "8", "64", "128"])
    parser.add_argument("--rounds", type=int, default=3, help="fair rounds of each case")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG)).save_pretrained(f"{folder}/model")
        mp.spawn(rank_main, (folder, arguments.cases, arguments.rounds), nprocs=2)


if __name__ == "__main__":
    main()
