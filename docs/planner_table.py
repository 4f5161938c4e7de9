"""What an even split costs: python docs/planner_table.py CHECKPOINT_OR_CONFIG... [--ranks 2 4 8 16]."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sharded_ckpt import plan_ownership

HEAD = "| model | ranks | even | min-max | even / min-max |\n|---|---|---|---|---|"


def rows(path: Path, ranks: Sequence[int]) -> Iterator[str]:
    """Plan a model for each number of ranks; `path` is a checkpoint's folder or a config.json by any name."""
    config = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    name = path.name.removesuffix(".json").removesuffix(".config")
    for count in ranks:
        even, best = plan_ownership(config, count, split="even"), plan_ownership(config, count)
        cells = [f"{max(plan.totals) / 1e9:.1f} GB, {plan.imbalance:.2f}x" for plan in (even, best)]
        yield f"| {name} | {count} | {' | '.join(cells)} | {max(even.totals) / max(best.totals):.2f} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table in Markdown, of the largest rank's weights and how many times the mean that is."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="CHECKPOINT_OR_CONFIG")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16])
    arguments = parser.parse_args(argv)
    found = (row for path in arguments.paths for row in rows(path, arguments.ranks))
    sys.stdout.write("\n".join([HEAD, *found]) + "\n")


if __name__ == "__main__":
    main()
