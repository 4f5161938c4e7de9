"""A child is fine-tuned over ranks, loses one of them, goes on with fewer, and becomes a checkpoint again.

    python -m sharded_ckpt demo --train

Twice: all of its weights, then low-rank adapters alone. What each rank does is in `fine_tuning_work`.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from patchers.errors import CheckpointError, CollectiveError
from sharded_ckpt.local_ranks import Place, on_ranks

from .pruning import Pruning
from .text import PROMPT
from .weights import find_weights

Kind: TypeAlias = Literal["full", "LoRA"]

TIMEOUT: Final = 480.0
"""Seconds that each run of the ranks may take, their imports included."""


@dataclass(frozen=True)
class FineTuningJob:
    """What ranks are told, all the same.

    Attributes:
        parent: A checkpoint.
        pruning: What its child goes without.
        scratch: Where the child, the runs and the results go.
        steps: Optimizer steps.
        save_interval: Steps from one checkpoint to the next.
        lose_at: The step after which the last rank is lost; None if none is.
    """

    parent: Path
    pruning: Pruning
    scratch: Path
    steps: int = 12
    save_interval: int = 4
    lose_at: int | None = None

    @property
    def child(self) -> Path:
        """The checkpoint that is fine-tuned."""
        return self.scratch / "child"

    def run(self, kind: Kind) -> Path:
        """Where the checkpoints of a training go."""
        return self.scratch / f"run-{kind}"

    def result(self, kind: Kind) -> Path:
        """Where a training's result goes, for Hugging Face's loaders."""
        return self.scratch / f"fine-tuned-{kind}"


@dataclass(frozen=True)
class RunResult:
    """What a training came to, as far as one process went.

    Attributes:
        first_step: The step that it was resumed from; 0 if it began.
        losses: Of each step after that.
    """

    first_step: int
    losses: tuple[float, ...]


@dataclass(frozen=True)
class KindResult:
    """What fine-tuning in one way came to.

    Attributes:
        kind: "full" or "LoRA".
        trained: How many numbers were trained.
        uninterrupted: The training on all ranks, from begin to end.
        lost: What was said when a rank was lost.
        resumed: The training that went on from the last checkpoint, on one rank.
        loss_before: Of the child, over the paragraph, in nats.
        loss_after: Of the exported result.
        completion: How the exported result goes on with the prompt.
    """

    kind: Kind
    trained: int
    uninterrupted: RunResult
    lost: str
    resumed: RunResult
    loss_before: float
    loss_after: float
    completion: str

    @property
    def largest_difference(self) -> float:
        """By how much a loss after the resume differs from that of the training without interruption."""
        begin = self.resumed.first_step
        pairs = zip(self.resumed.losses, self.uninterrupted.losses[begin:], strict=True)
        return max((abs(one - other) for one, other in pairs), default=0.0)


@dataclass(frozen=True)
class FineTuningResult:
    """What the example came to; its text is a table.

    Attributes:
        ranks: How many ranks trained.
        child: What the child goes without.
        kinds: What came of each way to fine-tune it.
        notice: What the user has to know, such as that weights are random; None if there is nothing.
    """

    ranks: int
    child: str
    kinds: tuple[KindResult, ...]
    notice: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether every training went on just as it would have without interruption, to a ten-thousandth."""
        return all(
            one.resumed.first_step > 0 and one.largest_difference <= 1e-4 * max(one.uninterrupted.losses)
            for one in self.kinds
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {**asdict(self), "is_exact": self.is_exact}

    def __str__(self) -> str:
        lines = [self.notice, ""] if self.notice else []
        lines += [
            f"child {self.child}, fine-tuned on {self.ranks} ranks, which lost one; resumed on 1",
            "",
            f"{'':6}{'numbers trained':>16}{'resumed at':>12}{'of':>4}{'largest difference':>20}"
            f"{'loss before':>13}{'after':>8}",
        ]
        for one in self.kinds:
            steps = len(one.uninterrupted.losses)
            lines.append(
                f"{one.kind:6}{one.trained:16,}{one.resumed.first_step:12}{steps:4}"
                f"{one.largest_difference:20.2g}{one.loss_before:13.3f}{one.loss_after:8.3f}"
            )
        lines += [f"\n{one.kind}: {PROMPT!r} -> {one.completion!r}" for one in self.kinds]
        return "\n".join(lines)


def run_fine_tuning(
    *,
    ranks: int = 2,
    cache_dir: str | os.PathLike[str] | None = None,
    real_weights: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
    timeout: float = TIMEOUT,
) -> FineTuningResult:
    """Fine-tune a child of SmolLM2 over ranks, kill one, resume on one rank, export, and generate.

    Each way (all weights, then LoRA) is trained twice on the ranks: without interruption, and up to a step
    after which the last rank is killed. One rank resumes that from the last checkpoint, which the ranks had
    saved while they trained. Its losses are compared with those of the training without interruption.

    Args:
        ranks: Number of ranks.
        cache_dir: Where the parent is kept; see `sharded_ckpt.demo.cache.cache_root` for the default.
        real_weights: Whether to try the real weights; a small random model serves otherwise.
        progress: Show the download, on stderr, if there is one.
        say: Told what is being done.
        timeout: Seconds that each run of the ranks may take.

    Raises:
        CollectiveError: Ranks failed that were not meant to.
        CheckpointError: No rank was lost, or there was nothing to resume.

    Example:
        >>> result = run_fine_tuning(real_weights=False)  # doctest: +SKIP
        >>> result.is_exact  # doctest: +SKIP
        True
    """
    weights = find_weights(cache_dir, real=real_weights, progress=progress, say=say)
    kinds: tuple[Kind, ...] = ("full", "LoRA") if importlib.util.find_spec("peft") else ("full",)
    notices = [weights.notice, None if len(kinds) == 2 else "Without peft there is no LoRA."]
    with tempfile.TemporaryDirectory(prefix=".fine-tuning.", dir=weights.folder.parent) as scratch:
        job = FineTuningJob(weights.folder, weights.pruning, Path(scratch))
        say(f"child, {weights.pruning}: made, and trained without interruption on {ranks} ranks")
        whole = on_ranks(_train_whole, [job, kinds], world_size=ranks, timeout=timeout)[0]
        lost = {kind: _lose_a_rank(job, kind, ranks, timeout, say) for kind in kinds}
        say("resumed on 1 rank, exported, and opened again")
        finished = on_ranks(_finish, [job, kinds], world_size=1, timeout=timeout)[0]
    return FineTuningResult(
        ranks=ranks,
        child=str(weights.pruning),
        kinds=tuple(replace(finished[kind], uninterrupted=whole[kind], lost=lost[kind]) for kind in kinds),
        notice=" ".join(filter(None, notices)) or None,
    )


def _lose_a_rank(
    job: FineTuningJob, kind: Kind, ranks: int, timeout: float, say: Callable[[str], None]
) -> str:
    """Train until the last rank is killed; return what is said of that."""
    doomed = replace(job, lose_at=2 * job.save_interval + 2)
    say(f"{kind}: trained on {ranks} ranks until one is killed, after step {doomed.lose_at}")
    try:
        on_ranks(_train_one, [doomed, kind], world_size=ranks, timeout=timeout)
    except CollectiveError as error:
        if "SIGKILL" in str(error):
            return str(error)
        raise
    raise CheckpointError("a rank was to be lost, and none was")


# On the ranks: each imports torch and transformers, which this module must not do for the parent process.


def _train_whole(place: Place, job: FineTuningJob, kinds: tuple[Kind, ...]) -> dict[Kind, RunResult]:
    from .fine_tuning_work import train_without_interruption

    return train_without_interruption(place, job, kinds)


def _train_one(place: Place, job: FineTuningJob, kind: Kind) -> RunResult:
    from .fine_tuning_work import train_on_ranks

    return train_on_ranks(place, job, kind)


def _finish(place: Place, job: FineTuningJob, kinds: tuple[Kind, ...]) -> dict[Kind, KindResult]:
    from .fine_tuning_work import resume_and_export

    return resume_and_export(place, job, kinds)
