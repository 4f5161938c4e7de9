"""The subcommand `sharded-ckpt diff`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from patchers.tables import Page
from sharded_ckpt.commands.arguments import add_checkpoint, add_json, as_json

DESCRIPTION = """\
Compare two checkpoints: their configs, what their blocks are, their tensors, and by how much the values
of each block differ. Block configs are compared as what the tensors are, in whatever dialect they are said.
"""
EPILOG = """\
exit code: 0 if they are equal, 1 if they differ or cannot be read

example:
  sharded-ckpt diff path/to/parent path/to/child
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add what `diff` can be told."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_checkpoint(parser, "first")
    add_checkpoint(parser, "second")
    parser.add_argument("--no-values", action="store_true", help="compare configs and headers only")
    add_json(parser)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[str | Page, int]:
    """Compare two checkpoints; the code is 1 if they differ.

    Raises:
        CheckpointError: One cannot be read.
    """
    from sharded_ckpt.progress import byte_progress
    from sharded_ckpt.report.difference import compare

    with byte_progress(None if sys.stderr.isatty() else False, 0, True, "comparing") as progress:
        found = compare(arguments.first, arguments.second, values=not arguments.no_values, progress=progress)
    return as_json(found.to_dict()) if arguments.json else found.page, 1 if found else 0
