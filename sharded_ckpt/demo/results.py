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
class StepResult:
    """Something that was done with the child's checkpoint as a whole.

    Attributes:
        action: "made", "saved" or "reloaded".
        ranks: How many ranks did it.
        nbytes: Of all tensors: in the files that were written, or in the memory of the ranks that reloaded.
        seconds: How long it took, on the rank where it took longest.
        equal: How many reloaded tensors equal, bit by bit, those of the child's own files; None if nothing
            was reloaded.
        differing: The names of the others.
    """

    action: str
    ranks: int
    nbytes: int
    seconds: float
    equal: int | None = None
    differing: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankResult:
    """What one rank found out.

    Attributes:
        start_seconds: How long it took until all ranks had imported everything and met.
        shards: One for each model; none on the rank that joins for a reload.
        steps: This rank's part of what was done with the child; none of what the first rank tells for all.
    """

    start_seconds: float
    shards: tuple[ShardResult, ...]
    steps: tuple[StepResult, ...]


@dataclass(frozen=True)
class ModelResult:
    """One model over all ranks.

    Attributes:
        name: "parent", "variant" or "child".
        folder: Its checkpoint; None for the child's, which goes when the demo ends.
        num_blocks: How many blocks it has.
        without_attention: The blocks whose attention is gone.
        without_ffn: The blocks whose FFN is gone.
        half_ffn: The blocks whose FFN is half as wide.
        loss: Mean over the tokens of the paragraph, in nats.
        completion: How the model goes on with the prompt.
        shards: One for each rank.
    """

    name: str
    folder: str | None
    num_blocks: int
    without_attention: tuple[int, ...]
    without_ffn: tuple[int, ...]
    half_ffn: tuple[int, ...]
    loss: float
    completion: str
    shards: tuple[ShardResult, ...]

    @property
    def tensors(self) -> int:
        """How many tensors the ranks own; a tied head counts as one."""
        return sum(shard.equal + len(shard.differing) for shard in self.shards)


@dataclass(frozen=True)
class DemoResult:
    """What one run of the demo found out. Printed, it is a report with tables.

    Attributes:
        notice: What the user has to know about the weights; None for the real ones.
        prompt: What the models completed.
        models: The parent, the variant and the child.
        steps: How the child was made, saved and reloaded.
        start_seconds: How long it took until all ranks had imported everything and met.
        seconds: How long everything took.
    """

    notice: str | None
    prompt: str
    models: tuple[ModelResult, ...]
    steps: tuple[StepResult, ...]
    start_seconds: float
    seconds: float

    def __str__(self) -> str:
        from .table import render

        return render(self)

    @property
    def is_exact(self) -> bool:
        """Whether every tensor of every shard equals its file, and each reload gave the whole child."""
        shards_equal = not any(shard.differing for model in self.models for shard in model.shards)
        return shards_equal and all(self.is_whole(step) for step in self.steps)

    def is_whole(self, step: StepResult) -> bool:
        """Whether a step, if it is a reload, gave every tensor of the child, bit by bit."""
        return step.equal in (None, self.models[-1].tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return {**asdict(self), "is_exact": self.is_exact}
