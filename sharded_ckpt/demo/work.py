"""What each rank of the demo does: load its shard of each model, run it, compare it with the files.

The child among them is made, saved and reloaded, too: on one rank more, and on one alone.
Importing this module imports torch and transformers; the rank's clock starts before that.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from patchers.descriptor import ModelDescriptor
from sharded_ckpt.config import load_model_config
from sharded_ckpt.launch import process_group, share_cores
from sharded_ckpt.loading.report import LoadReport
from sharded_ckpt.loading.verbs import load_and_shard_model
from sharded_ckpt.local_ranks import Place
from sharded_ckpt.pipeline import PipelineStage
from sharded_ckpt.runtime import Runtime, default_runtime

from .comparison import compare_with_files
from .job import Job
from .memory import forget_peak_memory, peak_memory
from .results import RankResult, ShardResult, StepResult
from .round_trip import make, reload, save
from .text import CALIBRATION, PARAGRAPH, PROMPT

_MOST_TOKENS = 24


def work(place: Place, job: Job, began: float) -> RankResult:
    """Load, run and check this rank's shard of each model, and take the child through the disk.

    Args:
        place: Which rank this is, and where the ranks meet. The last one joins for the reload only.
        job: What is to be done; the same on all ranks.
        began: When this rank began, by `time.perf_counter`.
    """
    members = range(place.world_size - 1)
    share_cores(place.world_size)
    descriptor = ModelDescriptor.from_config(load_model_config(job.parent))  # imports the family's modules
    tokenizer = AutoTokenizer.from_pretrained(job.parent)
    shards: list[ShardResult] = []
    steps: list[StepResult] = []
    with process_group(place, "gloo"):
        everyone = default_runtime(device="cpu", timeout=place.timeout)
        group = dist.new_group(list(members))
        everyone.control.gather(None, "meeting after the imports")
        start_seconds = time.perf_counter() - began
        if place.rank in members:
            runtime = default_runtime(device="cpu", process_group=group, timeout=place.timeout)
            shards, steps = _models(job, descriptor, tokenizer, runtime)
        everyone.control.gather(None, "meeting to reload the child")
        steps.append(reload(job.saved, job.child, descriptor, everyone))
        if place.rank == 0:
            steps.append(reload(job.saved, job.child, descriptor, Runtime(torch.device("cpu"))))
    return RankResult(start_seconds, tuple(shards), tuple(steps))


def _models(
    job: Job, descriptor: ModelDescriptor, tokenizer: PreTrainedTokenizerBase, runtime: Runtime
) -> tuple[list[ShardResult], list[StepResult]]:
    of_parent, stage = _examine(job.parent, descriptor, tokenizer, runtime)
    text = {"input_ids": torch.tensor([tokenizer(CALIBRATION)["input_ids"]])}
    scores = stage.score([text], activations=True, progress=False)
    del stage  # its memory shall not count for the next one
    of_variant, _ = _examine(job.variant, descriptor, tokenizer, runtime)
    made = make(job.parent, job.pruning, scores.ffn_channels, job.child, runtime)
    of_child, stage = _examine(job.child, descriptor, tokenizer, runtime)
    saved = save(stage.shard, job.saved, runtime)
    return [of_parent, of_variant, of_child], [made, saved] if runtime.is_main_process else []


class _Memory:
    """Peak memory over what the process has when this is made."""

    def __init__(self) -> None:
        gc.collect()  # the model before
        forget_peak_memory()
        self._before = peak_memory()

    def peak(self) -> int:
        return max(0, peak_memory() - self._before)


def _examine(
    folder: Path,
    descriptor: ModelDescriptor,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
) -> tuple[ShardResult, PipelineStage]:
    memory = _Memory()
    began = time.perf_counter()
    shard = load_and_shard_model(descriptor, folder, runtime=runtime, progress=False)
    load_seconds, load_peak = time.perf_counter() - began, memory.peak()
    forget_peak_memory()
    report: LoadReport = shard.load_report  # type: ignore[assignment]
    stage = PipelineStage(shard, runtime)
    found, completion = _run(stage, tokenizer)
    run_peak = memory.peak()
    comparison = compare_with_files(shard, folder)
    result = ShardResult(
        rank=runtime.global_rank,
        blocks=report.blocks,
        nbytes=report.nbytes,
        load_seconds=load_seconds,
        load_peak_bytes=load_peak,
        run_peak_bytes=run_peak,
        equal=comparison.equal,
        differing=comparison.differing,
        loss=found,
        completion=completion,
    )
    return result, stage


def _run(stage: PipelineStage, tokenizer: PreTrainedTokenizerBase) -> tuple[float | None, str]:
    """Return the loss on the paragraph, and how the model goes on with the prompt until the line ends."""
    paragraph, prompt = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (PARAGRAPH, PROMPT))
    output = stage(paragraph, labels=paragraph)
    tokens = stage.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_MOST_TOKENS,
        do_sample=False,
        stop_strings=["\n"],
        tokenizer=tokenizer,
    )
    made = tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
    return None if output is None else output.loss.item(), str(made).rstrip()
