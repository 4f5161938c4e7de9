"""The subcommand `sharded-ckpt inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from patchers.tables import Page
from sharded_ckpt.commands.arguments import add_checkpoint, add_json, as_json

DESCRIPTION = """\
Show what is in a checkpoint: each block with its attention, its FFN and its size, and all tensors with
their dtypes and shapes, names folded. What the blocks are is told from the shapes of their tensors;
where the config says something else, a note says so. Only headers are read, of a hub id too.
"""
EPILOG = """\
exit code: 0, or 1 if the checkpoint cannot be read

example:
  sharded-ckpt inspect path/to/checkpoint
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add what `inspect` can be told."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_checkpoint(parser)
    add_json(parser)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[str | Page, int]:
    """Look into a checkpoint.

    Raises:
        CheckpointError: It cannot be read.
    """
    from sharded_ckpt.report.overview import overview

    found = overview(arguments.checkpoint)
    return as_json(found.to_dict()) if arguments.json else found.page, 0
