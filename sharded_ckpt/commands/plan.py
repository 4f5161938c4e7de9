"""The subcommand `sharded-ckpt plan`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchers.tables import Page, Table, amount
from sharded_ckpt.commands.arguments import add_json, as_json, positive

if TYPE_CHECKING:
    from sharded_ckpt.ownership import OwnershipPlan
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


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[str | Page, int]:
    """Plan; the code is 1 if the model does not fit.

    Raises:
        OwnershipError: A size cannot be read.
        ConfigError: The costs cannot be counted, or a picture cannot be drawn here.
        CheckpointError: The checkpoint cannot be read.
    """
    from patchers.errors import OwnershipError
    from sharded_ckpt.ownership import plan_ownership
    from sharded_ckpt.ownership.budgets import read_budgets
    from sharded_ckpt.report.plan_target import PlanTarget

    target = PlanTarget.of(arguments.checkpoint)
    sizes = (arguments.batch, arguments.length)
    costs, budgets, memory = target.costs(arguments.by, *sizes), None, None
    if arguments.memory is not None:
        said = arguments.memory[0] if len(arguments.memory) == 1 else arguments.memory
        budgets = read_budgets(said, arguments.ranks)
        memory = None if arguments.by == "bytes+kv" else target.costs("bytes+kv", *sizes)
    limits: dict[str, Any] = {"budgets": budgets, "memory": memory}
    even = plan_ownership(costs, arguments.ranks, split="even", **limits)
    misfit = None
    try:
        plan = plan_ownership(costs, arguments.ranks, **limits)
    except OwnershipError as error:
        misfit, plan = str(error), plan_ownership(costs, arguments.ranks)
    if arguments.png is not None:
        from sharded_ckpt.plots import plot_plan

        title = f"{target.name}: {plan.num_blocks} blocks over {plan.world_size} ranks by {plan.by}"
        plot_plan(target.blocks(), plan, even, name=title).savefig(arguments.png, format="png", dpi=150)
        say(f"{arguments.png}: drawn")
    outcome = _Outcome(plan, even, target.reads(plan), misfit, target.notes(plan))
    return as_json(outcome.to_dict()) if arguments.json else outcome.page, 1 if misfit else 0


@dataclass(frozen=True)
class _Outcome:
    """What is to be said.

    Attributes:
        plan: The plan.
        even: The even split beside it.
        reads: What each rank reads; None where there are no weights.
        misfit: Why the model does not fit.
        notes: What a reader should know.
    """

    plan: OwnershipPlan
    even: OwnershipPlan
    reads: list[RankReads] | None
    misfit: str | None
    notes: list[str]

    @property
    def page(self) -> Page:
        """What it looks like."""
        notes = ["\n".join(f"note: {note}" for note in self.notes)] if self.notes else []
        even = replace(self.even.table, caption=f"an even split by number:\n{self.even.table.caption}")
        verdict = [self.misfit] if self.misfit else ["it fits"] if self.plan.budgets else []
        return [self.plan.table, *self._read_tables(), even, *notes, *verdict]

    def _read_tables(self) -> list[Table]:
        if self.reads is None:
            return []
        rows = [["rank", "reads", "of files", "to download"]]
        for rank, read in enumerate(self.reads):
            sizes = [amount(read.nbytes, "bytes"), str(len(read.files)), amount(read.download, "bytes")]
            rows.append([str(rank), *sizes])
        return [Table(rows)]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        asked = self.misfit is not None or self.plan.budgets is not None
        return {
            "by": self.plan.by,
            **_split_dict(self.plan),
            "even": _split_dict(self.even),
            "fits": self.misfit is None if asked else None,
            "misfit": self.misfit,
            "notes": self.notes,
            "reads": None if self.reads is None else [vars(read) for read in self.reads],
        }


def _split_dict(plan: OwnershipPlan) -> dict[str, Any]:
    ranks = zip(plan.blocks, plan.totals, plan.taken, strict=True)
    rows = [{"blocks": blocks, "cost": cost, "memory": taken} for blocks, cost, taken in ranks]
    return {"ranks": rows, "imbalance": plan.imbalance}
