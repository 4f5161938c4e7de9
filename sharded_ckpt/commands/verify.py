"""The subcommand `sharded-ckpt verify`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict

from patchers.tables import Page
from sharded_ckpt.commands.arguments import add_checkpoint, add_json, as_json

DESCRIPTION = """\
Check a checkpoint without a model: index, headers and files against each other, and the bytes of all
files against manifest.json, where there is one. All that is wrong is listed, not only the first thing.
"""
EPILOG = """\
exit code: 0 if nothing is wrong, else 1

example:
  sharded-ckpt verify path/to/checkpoint --scan
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add what `verify` can be told."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_checkpoint(parser)
    add_json(parser)
    parser.add_argument(
        "--scan", action="store_true", help="read all values, and look for NaN and infinities"
    )
    parser.add_argument(
        "--no-manifest", action="store_true", help="do not read the files to compare them with manifest.json"
    )
    parser.add_argument(
        "--fix-index",
        action="store_true",
        help="first write the index anew, in one atomic step, from what the files of a local directory hold",
    )


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[str | Page, int]:
    """Check a checkpoint; the code is 1 if something is wrong.

    Raises:
        CheckpointNotFoundError: There is nothing at that place.
        CheckpointError: The index cannot be written anew.
    """
    from sharded_ckpt.checkpoint.verify import rebuild_index, verify
    from sharded_ckpt.progress import byte_progress

    if arguments.fix_index:
        index = rebuild_index(arguments.checkpoint)
        say(f"{index.location}/{index.file}: written anew, {len(index)} tensors in {len(index.files)} files")
    with byte_progress(None if sys.stderr.isatty() else False, 0, True, "verifying") as progress:
        report = verify(
            arguments.checkpoint,
            manifest=not arguments.no_manifest,
            finite=arguments.scan,
            progress=progress,
        )
    said = as_json({"sound": bool(report), **asdict(report)}) if arguments.json else [str(report)]
    return said, 0 if report else 1
