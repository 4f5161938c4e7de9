"""What the demo found out, as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from patchers.names import fold, fold_indices

from .pruning import Pruning
from .results import DemoResult, ModelResult, ShardResult, StepResult
from .variant import Dropped

_WIDTH = 100
_SHARDS = (
    "model",
    "rank",
    "blocks",
    "no attn",
    "no FFN",
    "half FFN",
    "bytes",
    "load",
    "peak, load",
    "peak, run",
    "bit-equal",
)
_STEPS = ("child", "ranks", "bytes", "time", "bit-equal")
_RIGHT = frozenset({"bytes", "load", "ranks", "time", "peak, load", "peak, run", "loss"})
_LEGEND = """\
load       until the shard is ready, after all imports; its files are mapped, not copied
peak       memory over the state before the load: by the load, and by the run, which touches the weights
bit-equal  tensors with the very bits that safetensors' own reader reads from the files; after a reload,
           from those of the child before it was saved
time       until the files are written (the disk is not waited for), or the slowest rank is ready
loss       nats a token on a paragraph; this and the sentence are computed across the ranks"""


def render(result: DemoResult) -> str:
    """Return the report of a demo, about 100 columns wide.

    Text made by a model is escaped: random weights can write anything, terminal control codes too.
    """
    parts = [
        textwrap.fill(result.notice, _WIDTH) if result.notice else "",
        _title(result),
        _table(_SHARDS, [row for model in result.models for row in _shard_rows(model)]),
        _table(("model", "loss", "sentence"), [_model_row(model, result.prompt) for model in result.models]),
        _table(_STEPS, [_step_row(result, step) for step in result.steps]),
        _LEGEND,
        _verdict(result),
        f"{result.seconds:.1f} s in all; after {result.start_seconds:.1f} s of them, all ranks had started.",
    ]
    return "\n\n".join(part for part in parts if part)


def _title(result: DemoResult) -> str:
    parent, *variants = result.models
    ranks = len(parent.shards)
    lines = [
        f"parent   {Path(parent.folder or '').name}, {parent.num_blocks} blocks",
        *(f"{model.name:<8} {_pruning(model)}" for model in variants),
        f"ranks    {ranks}, on the CPU of this machine",
    ]
    return "\n".join(lines)


def _pruning(model: ModelResult) -> Pruning:
    return Pruning(Dropped(model.without_attention, model.without_ffn), model.half_ffn)


def _shard_rows(model: ModelResult) -> Iterable[Sequence[str]]:
    for shard in model.shards:
        yield (
            model.name,
            str(shard.rank),
            _indices(shard.blocks),
            _indices(set(shard.blocks) & set(model.without_attention)),
            _indices(set(shard.blocks) & set(model.without_ffn)),
            _indices(set(shard.blocks) & set(model.half_ffn)),
            _megabytes(shard.nbytes),
            f"{shard.load_seconds:.2f} s",
            f"+{_megabytes(shard.load_peak_bytes)}",
            f"+{_megabytes(shard.run_peak_bytes)}",
            _equality(shard),
        )


def _model_row(model: ModelResult, prompt: str) -> Sequence[str]:
    return model.name, f"{model.loss:.4f}", ascii(prompt + model.completion)


def _step_row(result: DemoResult, step: StepResult) -> Sequence[str]:
    equality = "-" if step.equal is None else f"{step.equal} of {result.models[-1].tensors}"
    return step.action, str(step.ranks), _megabytes(step.nbytes), f"{step.seconds:.2f} s", equality


def _verdict(result: DemoResult) -> str:
    if result.is_exact:
        return (
            "Every owned tensor on every rank equals its file, bit for bit, and so does every tensor of the\n"
            "child after it was saved and reloaded."
        )
    lines = [
        f"  {model.name}, rank {shard.rank}: {fold(shard.differing)}"
        for model in result.models
        for shard in model.shards
        if shard.differing
    ]
    lines += [
        f"  child, {step.action}, {step.ranks} rank{'s' if step.ranks > 1 else ''}: "
        f"{fold(step.differing) if step.differing else 'not as many tensors as the child has'}"
        for step in result.steps
        if not result.is_whole(step)
    ]
    return "\n".join(["THESE TENSORS DIFFER FROM THEIR FILES:", *lines])


def _equality(shard: ShardResult) -> str:
    return f"{shard.equal} of {shard.equal + len(shard.differing)}"


def _indices(blocks: Iterable[int]) -> str:
    return fold_indices(blocks) or "-"


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = [head, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(width) if name in _RIGHT else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * min(max(map(len, lines)), _WIDTH), *lines[1:]])
