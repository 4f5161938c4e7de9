"""Two gloo ranks run one llama: this library's pipeline beside that of transformers itself.

Both sit in the same two processes, with one thread each, and take turns; every turn begins together. The
bound is what the hardware gives: the two processes run the whole model side by side, independently, at the
sizes of the micro-batches. Our blocks are shared out by measured times, so that the head counts; transformers
gives each rank as many. Rounds in which a process waited for a processor for more than a tenth of its running
time are discarded. Ratios are medians of those within rounds.

"curve" measures a step of one half of the model by its rows, alone and with the other half beside it. "plan"
runs a heterogeneous model, with the same number of blocks on each rank and as the planner shares them out by
measured times, and compares the ratio with the one that the planner predicts.

    python benchmarks/bench_pipeline.py --cases prefill 1 8 64 128 curve plan
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.distributed import DistributedConfig
from transformers.generation import BaseStreamer

from patchers import AttentionConfig, BlockConfig, FFNConfig
from patchers.cache_names import cache_name
from sharded_ckpt import (
    PipelineStage,
    create_sharded_model,
    default_runtime,
    load_and_shard_model,
    plan_ownership,
)
from sharded_ckpt.ownership import OwnershipPlan, measure_block_times
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
CURVE = (1, 2, 3, 4, 8, 12, 16, 32, 64, 128)
LARGE, SMALL = BlockConfig(ffn=FFNConfig(5632)), BlockConfig(AttentionConfig(no_op=True), FFNConfig(1024))
BLOCKS = [LARGE] * 8 + [SMALL] * 12
STREAM = (24, 32)  # rows, one in each micro-batch, and tokens

Methods = dict[str, Callable[[], float]]
Rounds = list[dict[str, float]]
"""Seconds of each method in each fair round, on the slower rank."""


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


def rounds(methods: Methods, count: int, *, warm_up: bool = True) -> Rounds:
    """Return what every method took in the rounds in which no rank was kept waiting."""
    found: Rounds = []
    for number in range(-1 if warm_up else 0, 3 * count):
        ran, stood = waited()
        seconds = {}
        for name in list(methods) if number % 2 else list(methods)[::-1]:
            dist.barrier()
            seconds[name] = methods[name]()
        ran, stood = waited()[0] - ran, waited()[1] - stood
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, (stood / (ran + stood), seconds))
        if number < 0 or max(share for share, _ in said) > 0.1:
            continue
        found.append({name: max(each[name] for _, each in said) for name in methods})
        if len(found) == count:
            break
    return found


def median(found: Rounds, of: Callable[[dict[str, float]], float]) -> float:
    """Return the median over the rounds of a figure of each."""
    return round(statistics.median(map(of, found)), 4)


class Ranks:
    """What both ranks hold while they are compared.

    Args:
        folder: Where the model is.
        count: Fair rounds of each case.
    """

    def __init__(self, folder: str, count: int) -> None:
        self.folder, self.count = folder, count
        self.runtime = default_runtime(device="cpu")

    @cached_property
    def stage(self) -> PipelineStage:
        """This library's stage, with as many blocks as the other one has."""
        return self.stage_of(plan_ownership([1.0] * CONFIG["num_hidden_layers"], 2))

    def stage_of(self, plan: OwnershipPlan) -> PipelineStage:
        """Return this library's stage with these blocks."""
        mine = plan.blocks[self.runtime.global_rank]
        shard = load_and_shard_model("auto", self.folder, mine, runtime=self.runtime)
        return PipelineStage(shard, self.runtime)

    def times(self, config: LlamaConfig, **measured: Any) -> tuple[list[float], float]:
        """Return the seconds of each block and of the head, as both ranks have measured them."""
        times = measure_block_times(config, device="cpu", **measured)
        told = self.runtime.control.gather([list(times.blocks), times.head], "comparing measured times")
        blocks = [statistics.mean(pair) for pair in zip(*(blocks for blocks, _ in told), strict=True)]
        return blocks, statistics.mean(head for _, head in told)

    @cached_property
    def native(self) -> Any:
        """This rank's half in transformers' own pipeline."""
        config = DistributedConfig(pp_size=2)
        return AutoModelForCausalLM.from_pretrained(self.folder, distributed_config=config).eval()

    @cached_property
    def whole(self) -> Any:
        """The whole model, for the bound."""
        return AutoModelForCausalLM.from_pretrained(self.folder).eval()

    def say(self, **figures: Any) -> None:
        """Print figures once."""
        if self.runtime.is_main_process:
            print(json.dumps(figures), flush=True)

    def prefill(self) -> None:
        """Compare a forward pass over prompts."""
        batch, length = PREFILL
        ids, rows = torch.randint(4, 32000, (batch, length)), [2] * 4
        methods = {
            "ours": calling(self.stage, ids, micro_batches=rows),  # one token a row goes through the head
            "native": calling(self.native, ids),
            "alone, 2 rows": calling(self.whole, ids[:2]),
        }
        self.compare("prefill", rounds(methods, self.count), batch * length, rows)

    def decode(self, batch: int) -> None:
        """Compare steps of decoding."""
        length = PROMPT[batch]
        ids = torch.randint(4, 32000, (batch, length))
        step = {"batch": max(1, batch // 2), "length": 1, "past": length + STEPS}
        blocks, head = self.times(LlamaConfig(**CONFIG), **step)
        plan = plan_ownership(blocks, 2, last=head)
        stage = self.stage_of(plan)
        with torch.no_grad():
            rows = rows_of_step(stage, batch, length + STEPS)
        methods = {
            "ours": generating(stage.generate, ids, micro_batches=rows),
            "native": generating(self.native.generate, ids),
        }
        methods |= {f"alone, {r} rows": generating(self.whole.generate, ids[:r]) for r in sorted({*rows})}
        # the prompt and the first step, which are not counted, warm up
        self.compare(str(batch), rounds(methods, self.count, warm_up=False), batch, rows, plan.blocks)

    def compare(
        self, case: str, found: Rounds, tokens: int, rows: Sequence[int], blocks: Sequence[Any] = ()
    ) -> None:
        """Print tokens a second of both, and how far from those of two processes side by side.

        A single micro-batch keeps one stage busy at a time, so that bound is none for it.
        """
        if not found:
            return self.say(case=case, rows=rows, rounds=0)

        def bound(seconds: dict[str, float]) -> float:
            return sum(seconds[f"alone, {r} rows"] for r in rows) / 2

        self.say(
            case=case,
            rows=rows,
            blocks=[len(run) for run in blocks],
            ours=median(found, lambda s: tokens / s["ours"]),
            native=median(found, lambda s: tokens / s["native"]),
            ratio=median(found, lambda s: s["native"] / s["ours"]),
            bound=median(found, lambda s: s["native"] / bound(s)) if len(rows) > 1 else None,
            of_the_bound=median(found, lambda s: bound(s) / s["ours"]) if len(rows) > 1 else None,
            rounds=len(found),
        )

    def curve(self) -> None:
        """Print the milliseconds of a step of each rank's half, by rows: alone, and both at once."""
        inputs = {rows: self.step(rows) for rows in CURVE}
        body, rank = self.stage.body, self.runtime.global_rank
        methods: Methods = {}
        for rows in CURVE:
            for who in (0, 1, None):
                runs = partial(timed, body.run, inputs[rows]) if who in (rank, None) else lambda: 0.0
                methods[f"{rows} {'both' if who is None else who}"] = runs
        with torch.no_grad():
            found = rounds(methods, 2 * self.count)
        for who in ("0", "1", "both"):
            names = {rows: f"{rows} {who}" for rows in CURVE}
            ms = {rows: 1e3 * median(found, itemgetter(name)) for rows, name in names.items()}
            self.say(case="curve", rank=who, ms=ms, rounds=len(found))

    def step(self, rows: int) -> dict[str, Any]:
        """Return the inputs of a step of decoding, 32 tokens in."""
        cache = DynamicCache(config=self.stage.shard.config)
        options = {cache_name(self.stage.shard.forward): cache, "use_cache": True, "logits_to_keep": 1}
        with torch.no_grad():
            self.stage.body.run({"input_ids": torch.zeros(rows, 32, dtype=torch.int64), **options})
        return {"input_ids": torch.zeros(rows, 1, dtype=torch.int64), **options}

    def plan(self) -> None:
        """Compare the min-max split by time with the even one by count, on blocks that differ."""
        rows, length = STREAM
        config = LlamaConfig(**{**CONFIG, "vocab_size": 2048})
        blocks, head = self.times(config, length=length, block_configs=BLOCKS)
        even, planned = (plan_ownership(blocks, 2, last=head, split=split) for split in ("even", "min-max"))
        ids = torch.randint(4, 2048, (rows, length))
        found = rounds(
            {
                name: calling(self.of_blocks(config, plan), ids, micro_batches=rows)
                for name, plan in {"even": even, "min-max": planned}.items()
            },
            self.count,
        )
        predicted = max(even.totals) / max(planned.totals)
        measured = median(found, lambda s: s["even"] / s["min-max"]) if found else 0.0
        self.say(
            case="plan",
            blocks=[[len(run) for run in plan.blocks] for plan in (even, planned)],
            predicted=round(predicted, 3),
            measured=measured,
            of_predicted=round(measured / predicted, 3),
            rounds=len(found),
        )

    def of_blocks(self, config: LlamaConfig, plan: OwnershipPlan) -> PipelineStage:
        """Return this rank's stage of a new model of `BLOCKS`."""
        mine = plan.blocks[self.runtime.global_rank]
        shard = create_sharded_model(self.runtime, "llama", config, mine, device="cpu", block_configs=BLOCKS)
        return PipelineStage(shard, self.runtime)


def timed(run: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began


def rank_main(rank: int, meeting: str, folder: str, cases: list[str], count: int) -> None:
    """Measure all cases on one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}/meeting", rank=rank, world_size=2)
    ranks = Ranks(folder, count)
    for case in cases:
        torch.manual_seed(0)
        ranks.decode(int(case)) if case.isdecimal() else getattr(ranks, case)()
    dist.destroy_process_group()


def main() -> None:
    """Write the model, unless it is there, and start both ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = ["prefill", *map(str, PROMPT), "curve", "plan"]
    parser.add_argument("--cases", nargs="+", choices=choices, default=choices)
    parser.add_argument("--rounds", type=int, default=3, help="fair rounds of each case")
    parser.add_argument("--folder", type=Path, help="keep the model (1.3 GB) here, for other runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        if not (folder / "config.json").exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG)).save_pretrained(folder)
        mp.spawn(rank_main, (scratch, str(folder), arguments.cases, arguments.rounds), nprocs=2)


if __name__ == "__main__":
    main()
