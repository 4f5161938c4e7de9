"""What the demo found out: plain data, for the table and for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ShardResult:
    """One rank's shard of one model.

    Attributes:
        rank: The rank.
        blocks: The blocks that it owns.
        nbytes: Their size in memory, in bytes.
        load_seconds: How long the load took, after all imports.
        load_peak_bytes: Peak memory of the load, over what the process had before it, all imports done.
        run_peak_bytes: The same for loss and completion, which touch the weights.
        equal: How many tensors equal, bit by bit, those that safetensors' own reader reads from the files.
        differing: The names of the others.
        loss: Mean over the tokens of the paragraph, in nats; None on ranks without the head.
        completion: How the model goes on with the prompt.
    """

    rank: int
    blocks: tuple[int, ...]
    nbytes: int
    load_seconds: float
    load_peak_bytes: int
    run_peak_bytes: int
    equal: int
    differing: tuple[str, ...]
    loss: float | None
    completion: str


@dataclass(frozen=True)
class RankResult:
    """What one rank found out.

    Attributes:
        start_seconds: How long it took until all ranks had imported everything and met.
        shards: One for each model.
    """

    start_seconds: float
    shards: tuple[ShardResult, ...]


@dataclass(frozen=True)
class ModelResult:
    """One model over all ranks.

    Attributes:
        name: "parent" or "variant".
        folder: Its checkpoint.
        num_blocks: How many blocks it has.
        without_attention: The blocks whose attention is gone.
        without_ffn: The blocks whose FFN is gone.
        loss: Mean over the tokens of the paragraph, in nats.
        completion: How the model goes on with the prompt.
        shards: One for each rank.
    """

    name: str
    folder: str
    num_blocks: int
    without_attention: tuple[int, ...]
    without_ffn: tuple[int, ...]
    loss: float
    completion: str
    shards: tuple[ShardResult, ...]


@dataclass(frozen=True)
class DemoResult:
    """What one run of the demo found out. Printed, it is a report with tables.

    Attributes:
        notice: What the user has to know about the weights; None for the real ones.
        prompt: What the models completed.
        models: The parent and the variant.
        start_seconds: How long it took until all ranks had imported everything and met.
        seconds: How long everything took.
    """

    notice: str | None
    prompt: str
    models: tuple[ModelResult, ...]
    start_seconds: float
    seconds: float

    def __str__(self) -> str:
        from .table import render

        return render(self)

    @property
    def is_exact(self) -> bool:
        """Whether every tensor of every shard equals its file."""
        return not any(shard.differing for model in self.models for shard in model.shards)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return {**asdict(self), "is_exact": self.is_exact}
