"""Scoring a dataset over the stages: log-probabilities, and what pruning wants to know of a parent."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div

from patchers.errors import ConfigError
from sharded_ckpt.children.choices import Scores
from sharded_ckpt.pipeline.activation_statistics import FFN_CHANNELS, KV_HEADS, ActivationStatistics, add_up
from sharded_ckpt.pipeline.inputs import MicroBatches, cut, fingerprint
from sharded_ckpt.pipeline.micro_batches import rows_of_pass
from sharded_ckpt.pipeline.score_sums import LOG_PROBS, Progress, read_progress, save_progress, united
from sharded_ckpt.pipeline.training_step import separated
from sharded_ckpt.progress import unit_progress

if TYPE_CHECKING:
    from sharded_ckpt.pipeline.connected_stage import ConnectedStage

_IGNORED = -100  # transformers' label of tokens that do not count
_LOSS, _KL, _COSINE = "loss", "kl", "cosine"


@dataclass(frozen=True)
class ScoreResult:
    """What a model makes of a dataset. The same on every rank, but for `log_probs`.

    Attributes:
        loss: Mean negative log-likelihood of the tokens that count, in nats.
        tokens: How many counted.
        log_probs: For each row, the log-probability `(tokens - 1,)` of each token after the first, NaN where
            it does not count; on the rank of the head, else None.
        kl: Mean divergence KL(teacher || model) of the next token, in nats; None without a teacher.
        cosine: By block, the mean cosine of the hidden states after it and those of the teacher.
        ffn_channels: By block, the score of each channel, as `init_child_from_parent` takes them.
        kv_heads: By block, the score of each KV head, likewise.
    """

    loss: float
    tokens: int
    log_probs: tuple[Tensor, ...] | None = field(default=None, repr=False)
    kl: float | None = None
    cosine: Mapping[int, float] = field(default_factory=dict)
    ffn_channels: Mapping[int, Scores] = field(default_factory=dict, repr=False)
    kv_heads: Mapping[int, Scores] = field(default_factory=dict, repr=False)

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


def score(
    stage: ConnectedStage,
    dataset: Iterable[Mapping[str, Any]],
    *,
    micro_batches: MicroBatches = 1,
    teacher: ConnectedStage | None = None,
    activations: bool = False,
    resume_dir: str | os.PathLike[str] | None = None,
    save_every: int = 64,
    progress: bool | Callable[[int], object] | None = None,
) -> ScoreResult:
    """Score a dataset. See `PipelineStage.score`."""
    if teacher is not None and teacher.lineup != stage.lineup:
        raise ConfigError(
            f"the teacher's blocks are on other ranks ({teacher.lineup.owned}) than the model's "
            f"({stage.lineup.owned}); load both with the same owned_block_indexes"
        )
    done = Progress() if resume_dir is None else read_progress(stage, resume_dir)
    scoring = _Scoring(stage, teacher, activations, dict(done.sums))
    total = len(dataset) if isinstance(dataset, Sized) else None
    with unit_progress(progress, total, stage.runtime.is_main_process, "scoring", "batch") as told:
        for number, digest in _scored(scoring, dataset, micro_batches, done, told):
            if resume_dir is not None and number > done.batches and number % save_every == 0:
                save_progress(stage, resume_dir, Progress(number, digest, scoring.sums))
    if resume_dir is not None and number > done.batches and number % save_every:
        save_progress(stage, resume_dir, Progress(number, digest, scoring.sums))
    with stage.collectively("putting the scores together"):
        result = scoring.result()
        stage.conclude()
    return result


def _scored(
    scoring: _Scoring,
    dataset: Iterable[Mapping[str, Any]],
    micro_batches: MicroBatches,
    done: Progress,
    told: Callable[[int], object] | None,
) -> Iterator[tuple[int, str]]:
    """Score batch by batch, and yield how many are done, and a digest of their content."""
    batches, number, digest = iter(dataset), 0, hashlib.blake2b(digest_size=16)
    while True:
        with scoring.stage.collectively("scoring"), torch.no_grad():
            batch = next(batches, None)  # the data may fail on one rank alone
            if batch is None:
                break
            number += 1
            digest.update(fingerprint(batch).numpy().tobytes())
            if number > done.batches:
                scoring.run(batch, micro_batches)
            elif number == done.batches and digest.hexdigest() != done.digest:
                raise ConfigError(
                    f"the saved scores are of other data: their first {number} batches are not those of this "
                    "dataset; score into another directory, or remove it"
                )
            if told is not None:
                told(1)  # a function of the caller's own may fail on one rank alone, too
        yield number, digest.hexdigest()
    needed = max(done.batches, 1)
    if number < needed:
        raise ConfigError(f"the dataset has {number} batches; {needed} or more are needed")


class _Scoring:
    """What one rank adds up while a dataset goes through its stage.

    Attributes:
        stage: Its stage.
        sums: This rank's part, by names of which no two ranks have the same. The last element of a sum is the
            number of tokens behind it.
    """

    def __init__(
        self,
        stage: ConnectedStage,
        teacher: ConnectedStage | None,
        activations: bool,
        sums: dict[str, Tensor],
    ) -> None:
        self.stage, self._teacher, self.sums = stage, teacher, sums
        self._measures = activations or teacher is not None
        blocks = stage.body.blocks if activations else ()
        self._statistics = ActivationStatistics(stage.shard, stage.descriptor, blocks, sums)

    def run(self, batch: Mapping[str, Any], micro_batches: MicroBatches) -> None:
        """Let a batch go through, in micro-batches."""
        stage = self.stage
        inputs, _ = separated(stage.shard, batch)
        if self._measures and inputs.get("attention_mask") is not None:
            _as_large_as(batch["input_ids"], "attention_mask", inputs["attention_mask"])
        here = stage.admit({**inputs, "use_cache": False}, extra=micro_batches)
        sizes = rows_of_pass(stage, here, micro_batches)
        parts = list(cut(here, sizes))
        labels = [part["labels"] for part in cut({**batch, "labels": _labels(batch)}, sizes)]
        shapes = [part["input_ids"].shape for part in parts]
        # with a teacher, hidden states of two models come in turns, and cannot be asked for ahead
        ahead = stage.expecting(shapes, 2 if self._teacher is None else 0)
        for part, of_part in zip(parts, labels, strict=True):
            if not stage.body.blocks:
                continue
            taught = None if self._teacher is None else self._run(self._teacher, part)
            next(ahead)
            with self._statistics.counting(part.get("attention_mask")):
                passed = self._run(stage, part)
            if taught is not None:
                self._compare(passed, taught, part.get("attention_mask"))
            if stage.is_last:
                self._read(passed.logits, of_part.to(stage.runtime.device), taught)

    def _run(self, stage: ConnectedStage, part: Mapping[str, Any]) -> _Seen:
        if stage is self._teacher:
            stage.expect(part["input_ids"].shape)
        seen: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for index in stage.body.blocks if self._teacher is not None else ():
                block = stage.shard.get_submodule(stage.descriptor.block_name(index))
                stack.enter_context(block.register_forward_hook(_seeing(seen, index)))
            passed = stage.run(part)
        return _Seen(seen, passed.output.logits if stage.is_last else None)

    def _compare(self, model: _Seen, teacher: _Seen, mask: Tensor | None) -> None:
        for index, hidden_states in model.hidden_states.items():
            cosine = cosine_similarity(hidden_states.double(), teacher.hidden_states[index].double(), dim=-1)
            counts = torch.ones_like(cosine) if mask is None else mask.to(cosine)
            add_up(self.sums, f"{_COSINE}.{index}", torch.stack([(cosine * counts).sum(), counts.sum()]))

    def _read(self, logits: Tensor | None, labels: Tensor, taught: _Seen | None) -> None:
        if logits is None:
            return
        log_probs = logits[:, :-1].float().log_softmax(-1)
        targets, counts = labels[:, 1:], labels[:, 1:] != _IGNORED
        found = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        add_up(self.sums, _LOSS, torch.stack([-found[counts].double().sum(), counts.sum()]))
        row = sum(name.startswith(LOG_PROBS) for name in self.sums)
        for at, of_row in enumerate(found.masked_fill(~counts, math.nan)):
            self.sums[f"{LOG_PROBS}.{row + at}"] = of_row.cpu().clone()
        if taught is not None and taught.logits is not None:
            theirs = taught.logits[:, :-1].float().log_softmax(-1)
            divergence = kl_div(log_probs, theirs, reduction="none", log_target=True).sum(-1)[counts]
            add_up(self.sums, _KL, torch.stack([divergence.double().sum(), counts.sum()]))

    def result(self) -> ScoreResult:
        """Return the means, on every rank those of all ranks."""
        rows = {name: value for name, value in self.sums.items() if name.startswith(LOG_PROBS)}
        sums = united(self.stage, {name: s for name, s in self.sums.items() if name not in rows})
        means = {name: (value[:-1] / value[-1]) for name, value in sums.items()}
        return ScoreResult(
            loss=means[_LOSS].item(),
            tokens=int(sums[_LOSS][-1]),
            log_probs=tuple(rows[f"{LOG_PROBS}.{row}"] for row in range(len(rows))) or None,
            kl=means[_KL].item() if _KL in means else None,
            cosine={index: mean.item() for index, mean in _of_blocks(means, _COSINE)},
            ffn_channels={index: Scores(mean.sqrt()) for index, mean in _of_blocks(means, FFN_CHANNELS)},
            kv_heads={index: Scores(mean.sqrt()) for index, mean in _of_blocks(means, KV_HEADS)},
        )


@dataclass(frozen=True)
class _Seen:
    """What was seen of a pass: the hidden states after each owned block, if wanted, and the logits."""

    hidden_states: Mapping[int, Tensor]
    logits: Tensor | None


def _seeing(seen: dict[int, Tensor], index: int) -> Callable[..., None]:
    def see(_: nn.Module, args: Any, output: Any) -> None:
        seen[index] = output if isinstance(output, Tensor) else output[0]

    return see


def _labels(batch: Mapping[str, Any]) -> Tensor:
    """Return the labels of a batch; by default its tokens, but for padding and what is predicted from it.

    Raises:
        ConfigError: They are shifted already, or do not say of each token whether it counts.
    """
    if batch.get("shift_labels") is not None:
        raise ConfigError("score shifts labels itself: give labels as a model takes them, not shift_labels")
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if batch.get("labels") is not None:
        labels: Tensor = batch["labels"]
        return _as_large_as(ids, "labels", labels)
    if mask is None:
        return ids
    _as_large_as(ids, "attention_mask", mask)
    hidden = mask == 0
    hidden[:, 1:] |= mask[:, :-1] == 0
    return ids.masked_fill(hidden, _IGNORED)


def _as_large_as(ids: Tensor, name: str, given: Tensor) -> Tensor:
    """Return what is given if it says something of each token; a smaller one would be read as if it did."""
    if given.shape != ids.shape:
        raise ConfigError(
            f"{name} {tuple(given.shape)} must be as large as input_ids {tuple(ids.shape)} to say which of "
            "them count"
        )
    return given


def _of_blocks(means: Mapping[str, Tensor], kind: str) -> Iterator[tuple[int, Tensor]]:
    named = {name.removeprefix(f"{kind}."): mean for name, mean in means.items()}
    return iter(sorted((int(index), mean) for index, mean in named.items() if index.isdecimal()))
