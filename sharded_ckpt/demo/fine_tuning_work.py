"""What each rank of the fine-tuning example does. It reads like a training script of one's own."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from sharded_ckpt.children import init_child_from_parent
from sharded_ckpt.config import load_model_config
from sharded_ckpt.launch import process_group, share_cores
from sharded_ckpt.loading import load_and_shard_model
from sharded_ckpt.local_ranks import Place
from sharded_ckpt.pipeline import PipelineStage
from sharded_ckpt.runtime import Runtime, default_runtime
from sharded_ckpt.training import AsyncCallsQueue, GlobalState, export_checkpoint, save_adapter
from sharded_ckpt.training.checkpointing import (
    CheckpointConfig,
    CheckpointLoadContext,
    CheckpointSaveContext,
    create_checkpoint_manager,
)

from .fine_tuning import FineTuningJob, Kind, KindResult, RunResult
from .text import PARAGRAPH, PROMPT

_ROWS, _TOKENS, _MICRO_BATCHES = 2, 24, 2
_LEARNING_RATES: Final = {"full": 2e-5, "LoRA": 1e-3}
_MAX_NORM = 1.0
_MOST_TOKENS = 24


def train_without_interruption(
    place: Place, job: FineTuningJob, kinds: tuple[Kind, ...]
) -> dict[Kind, RunResult]:
    """Make the child, then train it in each way from begin to end; nothing is saved."""
    with _ranks(place) as runtime:
        blocks = job.pruning.block_configs(load_model_config(job.parent).intermediate_size)
        init_child_from_parent(job.parent, blocks, job.child, runtime=runtime, durable=False, progress=False)
        return {kind: Training.begin(job, kind, runtime).train(save=False) for kind in kinds}


def train_on_ranks(place: Place, job: FineTuningJob, kind: Kind) -> RunResult:
    """Train in one way, with checkpoints."""
    with _ranks(place) as runtime:
        return Training.begin(job, kind, runtime).train()


def resume_and_export(place: Place, job: FineTuningJob, kinds: tuple[Kind, ...]) -> dict[Kind, KindResult]:
    """Go on from what other ranks have saved, write the result for others, open that, and let it speak."""
    with _ranks(place) as runtime:
        before = _loss_and_completion(load_and_shard_model("auto", job.child, progress=False), job)[0]
        return {kind: _finished(job, kind, runtime, before) for kind in kinds}


@dataclass
class Training:
    """One training of the child on this rank's blocks.

    Attributes:
        job: What is trained, for how long.
        kind: In which way.
        stage: This rank's blocks.
        model: What is saved: the shard, or what peft made of it.
        state: Step, config, saves under way.
        optimizer: None on a rank that trains nothing.
        batches: All of the data.
    """

    job: FineTuningJob
    kind: Kind
    stage: PipelineStage
    model: nn.Module
    state: GlobalState
    optimizer: torch.optim.Optimizer | None
    batches: torch.Tensor

    @classmethod
    def begin(cls, job: FineTuningJob, kind: Kind, runtime: Runtime) -> Training:
        """Load the child; nothing is trained yet."""
        shard: PreTrainedModel = load_and_shard_model(
            "auto", job.child, runtime=runtime, dtype=torch.float32, materialize=True, progress=False
        )
        model, peft_config = _with_adapters(shard) if kind == "LoRA" else (shard, None)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        run = job.run(kind)
        config = CheckpointConfig(
            save=run,
            load=run,
            save_interval=job.save_interval,
            most_recent_k=2,
            async_save=True,
            durable=False,
        )
        return cls(
            job,
            kind,
            PipelineStage(shard, runtime),
            model,
            GlobalState(config, runtime=runtime, peft_config=peft_config),
            torch.optim.AdamW(trained, _LEARNING_RATES[kind]) if trained else None,
            _batches(job.child),
        )

    def train(self, *, save: bool = True) -> RunResult:
        """Train to the end, from the last checkpoint if there is one.

        Args:
            save: Whether to save and resume at all.
        """
        config, progress = self.state.checkpoint_config, self.state.train_state
        manager, losses = create_checkpoint_manager(config), []
        with AsyncCallsQueue(self.stage.runtime.control) as self.state.async_calls_queue:
            if save:
                manager.load(CheckpointLoadContext(self.state, self.model, self.optimizer, None))
            first = progress.step
            while progress.step < self.job.steps:
                losses.append(self._step())
                last = progress.step == self.job.steps
                if save and config.due(progress.step, last=last):
                    manager.save(CheckpointSaveContext(self.state, self.model, self.optimizer, None, 0))
                manager.finalize_async_saves(self.state)
                self._maybe_die()
        return RunResult(first, tuple(losses))

    def _step(self) -> float:
        batch = self.batches[self.state.train_state.step % len(self.batches)]
        inputs = {"input_ids": batch, "labels": batch}
        loss = self.stage.train_step(inputs, micro_batches=_MICRO_BATCHES)
        self.stage.clip_grad_norm_(_MAX_NORM)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.state.train_state.step += 1
        self.state.train_state.consumed_train_samples += _ROWS
        return loss.item()

    def _maybe_die(self) -> None:
        """Be lost, as a machine is that loses its power."""
        if self.state.train_state.step == self.job.lose_at and self.stage.runtime.is_last_process:
            os.kill(os.getpid(), signal.SIGKILL)


def _finished(job: FineTuningJob, kind: Kind, runtime: Runtime, before: float) -> KindResult:
    training = Training.begin(job, kind, runtime)
    resumed = training.train()
    trained = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    if kind == "LoRA":
        save_adapter(job.result(kind), training.model, durable=False)
        result = _opened_by_peft(job.child, job.result(kind))
    else:
        export_checkpoint(job.result(kind), training.model, source=job.child, durable=False)
        result = load_and_shard_model("auto", job.result(kind), progress=False)
    after, completion = _loss_and_completion(result, job)
    nothing_yet = RunResult(0, ())
    return KindResult(kind, trained, nothing_yet, "", resumed, before, after, completion)


def _with_adapters(shard: PreTrainedModel) -> tuple[nn.Module, Any]:
    """Freeze a shard and put adapters on its projections; a rank without blocks has none."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=r".*\.(q_proj|v_proj|up_proj|down_proj)")
    shard.requires_grad_(False)
    if not any(name.endswith("_proj") for name, _ in shard.named_modules()):
        return shard, config
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return peft.get_peft_model(shard, config), config


def _opened_by_peft(child: Path, adapter: Path) -> Any:
    import peft

    base = load_and_shard_model("auto", child, dtype=torch.float32, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return peft.PeftModel.from_pretrained(base, adapter).eval()


def _batches(folder: Path) -> torch.Tensor:
    """Return the paragraph, over and over, as batches `(count, rows, tokens)`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(PARAGRAPH)["input_ids"])
    count = max(1, len(ids) // (_ROWS * _TOKENS))
    return ids[: count * _ROWS * _TOKENS].view(count, _ROWS, _TOKENS)


@torch.no_grad()
def _loss_and_completion(model: Any, job: FineTuningJob) -> tuple[float, str]:
    tokenizer = AutoTokenizer.from_pretrained(job.child)
    paragraph, prompt = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (PARAGRAPH, PROMPT))
    loss = model(input_ids=paragraph, labels=paragraph).loss.item()
    tokens = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_MOST_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    made = tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
    return loss, str(made).split("\n")[0].rstrip()


@contextmanager
def _ranks(place: Place) -> Iterator[Runtime]:
    """Join the ranks that train together."""
    share_cores(place.world_size)
    with process_group(place, "gloo"):
        yield default_runtime(device="cpu", timeout=place.timeout)
