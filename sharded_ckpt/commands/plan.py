"""The subcommand `sharded-ckpt plan`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharded_ckpt.commands.arguments import add_json, as_json, positive

if TYPE_CHECKING:
    from sharded_ckpt.ownership import ModelCosts, OwnershipPlan
    from sharded_ckpt.report.rank_reads import RankReads

DESCRIPTION = """\
Show which rank would own which blocks, beside an even split by number: what each rank has, how that
compares with the mean, and what it reads of the files. With --memory, whether the model fits.
Only the config and headers are read; a config.json without weights will do.
"""
EPILOG = """\
exit code: 0, or 1 if the model does not fit into the memory

example:
  sharded-ckpt plan path/to/checkpoint --ranks 8 --memory 80GiB --batch 8 --length 4096 --by bytes+kv
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add what `plan` can be told."""
    from sharded_ckpt.ownership.costs import MEASURES

    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("checkpoint", help="a directory, a config.json, a hub id such as org/name, or a URL")
    parser.add_argument("--ranks", type=positive, required=True, metavar="N", help="number of ranks")
    parser.add_argument("--by", choices=MEASURES, default="bytes", help="what is counted (default: bytes)")
    parser.add_argument(
        "--memory",
        action="append",
        metavar="SIZE",
        help="what a rank may take for weights and a full KV cache of --batch sequences of --length tokens, "
        "such as 80GiB; give it once, or once for each rank",
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="B", help="sequences (default: 1)")
    parser.add_argument(
        "--length", type=positive, default=4096, metavar="T", help="tokens of a sequence (default: 4096)"
    )
    parser.add_argument(
        "--png",
        type=Path,
        metavar="FILE",
        help="also draw the blocks, who owns them, and what each rank has (needs matplotlib)",
    )
    add_json(parser)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[str, int]:
    """Plan; the code is 1 if the model does not fit.

    Raises:
        OwnershipError: A size cannot be read.
        ConfigError: The costs cannot be counted, or a picture cannot be drawn here.
        CheckpointError: The checkpoint cannot be read.
    """
    from patchers.errors import OwnershipError
    from sharded_ckpt.ownership import plan_ownership
    from sharded_ckpt.ownership.budgets import read_budgets

    target = _target(arguments.checkpoint)
    sizes = {"batch": arguments.batch, "length": arguments.length}
    costs, budgets, memory = _costs(target, arguments.by, sizes), None, None
    if arguments.memory is not None:
        said = arguments.memory[0] if len(arguments.memory) == 1 else arguments.memory
        budgets = read_budgets(said, arguments.ranks)
        memory = None if arguments.by == "bytes+kv" else _costs(target, "bytes+kv", sizes)
    limits: dict[str, Any] = {"budgets": budgets, "memory": memory}
    even = plan_ownership(costs, arguments.ranks, split="even", **limits)
    misfit = None
    try:
        plan = plan_ownership(costs, arguments.ranks, **limits)
    except OwnershipError as error:
        misfit, plan = str(error), plan_ownership(costs, arguments.ranks)
    if arguments.png is not None:
        _draw(arguments.png, target, plan, even)
        say(f"{arguments.png}: drawn")
    reads = _reads(target, plan)
    if arguments.json:
        return as_json(_as_dict(plan, even, reads, misfit)), 1 if misfit else 0
    return _as_text(plan, even, reads, misfit), 1 if misfit else 0


def _costs(target: str | Path | Mapping[str, Any], by: str, sizes: dict[str, int]) -> ModelCosts:
    """Count by the config; of quantised weights it does not tell the bytes, so that headers are asked."""
    from sharded_ckpt.checkpoint.source import open_source, read_json
    from sharded_ckpt.ownership import costs_of
    from sharded_ckpt.report.rank_reads import stored_costs

    if by == "bytes" and not isinstance(target, Mapping):
        source = open_source(target)
        if source.exists("config.json") and read_json(source, "config.json").get("quantization_config"):
            return stored_costs(target)
    return costs_of(target, by=by, **sizes)


def _draw(
    file: Path, target: str | Path | Mapping[str, Any], plan: OwnershipPlan, even: OwnershipPlan
) -> None:
    from sharded_ckpt.plots.page import plot_plan
    from sharded_ckpt.report.model_blocks import model_blocks

    name = "" if isinstance(target, Mapping) else Path(target).name
    title = f"{name or 'model'}: {plan.num_blocks} blocks over {plan.world_size} ranks by {plan.by}"
    plot_plan(model_blocks(target), plan, even, name=title).savefig(file, format="png", dpi=150)


def _target(checkpoint: str) -> str | Path | Mapping[str, Any]:
    """Return the checkpoint, the folder of a config.json, or the content of a config of another name."""
    path = Path(checkpoint)
    if path.suffix != ".json" or path.name.endswith(".index.json") or not path.is_file():
        return checkpoint
    if path.name == "config.json":
        return path.parent
    from sharded_ckpt.checkpoint.strict_json import parse_json

    config: Mapping[str, Any] = parse_json(path.read_bytes(), checkpoint)
    return config


def _reads(target: str | Path | Mapping[str, Any], plan: OwnershipPlan) -> list[RankReads] | None:
    """Return what the ranks read, None where there are no weights."""
    from patchers.errors import CheckpointNotFoundError
    from sharded_ckpt.report.rank_reads import rank_reads

    if isinstance(target, Mapping):
        return None
    try:
        return rank_reads(target, plan)
    except CheckpointNotFoundError:
        return None


def _as_text(
    plan: OwnershipPlan, even: OwnershipPlan, reads: list[RankReads] | None, misfit: str | None
) -> str:
    from sharded_ckpt.ownership.table import amount, as_text

    parts = [str(plan)]
    if reads is not None:
        rows = [["rank", "reads", "of files", "to download"]]
        for rank, read in enumerate(reads):
            sizes = [amount(read.nbytes, "bytes"), str(len(read.files)), amount(read.download, "bytes")]
            rows.append([str(rank), *sizes])
        parts.append(as_text(rows))
    parts.append(f"an even split by number:\n{even}")
    if misfit:
        parts.append(misfit)
    elif plan.budgets:
        parts.append("it fits")
    return "\n\n".join(parts)


def _as_dict(
    plan: OwnershipPlan, even: OwnershipPlan, reads: list[RankReads] | None, misfit: str | None
) -> dict[str, Any]:
    said = {"by": plan.by, **_split_dict(plan), "even": _split_dict(even), "fits": None, "misfit": misfit}
    if misfit or plan.budgets:
        said["fits"] = misfit is None
    return {**said, "reads": None if reads is None else [vars(read) for read in reads]}


def _split_dict(plan: OwnershipPlan) -> dict[str, Any]:
    ranks = zip(plan.blocks, plan.totals, plan.taken, strict=True)
    rows = [{"blocks": blocks, "cost": cost, "memory": taken} for blocks, cost, taken in ranks]
    return {"ranks": rows, "imbalance": plan.imbalance}
