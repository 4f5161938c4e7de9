"""The subcommand `sharded-ckpt convert`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from patchers.tables import Page
from sharded_ckpt.commands.arguments import add_checkpoint, add_dialect, positive

DESCRIPTION = """\
Write a checkpoint anew: with its blocks said in another dialect, in another dtype, in another number of
files. The rest stays as it is, tensors bit for bit. The new directory appears whole, or not at all.
"""
EPILOG = """\
exit code: 0, or 1 if nothing was written

example:
  sharded-ckpt convert path/to/checkpoint path/to/copy --dialect per-layer --shards 4
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add what `convert` can be told."""
    from sharded_ckpt.saving.conversion import DTYPES

    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_checkpoint(parser)
    parser.add_argument("target", help="the new directory")
    add_dialect(parser, "in which config.json is to say the blocks")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="cast the weights; integers and quantised tensors stay",
    )
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--shards", type=positive, metavar="N", help="number of files, even in bytes")
    files.add_argument("--max-shard-size", metavar="SIZE", help="the most in one file, such as 5GB")
    files.add_argument("--single-file", action="store_true", help="one model.safetensors, without an index")
    parser.add_argument("--manifest", action="store_true", help="write the SHA-256 of each file, too")
    parser.add_argument("--overwrite", action="store_true", help="the target may hold something already")


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[str | Page, int]:
    """Convert a checkpoint.

    Raises:
        ShardedCkptError: It cannot be read, cannot be said so, or there is something at the target.
    """
    from sharded_ckpt.report.overview import overview
    from sharded_ckpt.saving.conversion import convert_checkpoint

    convert_checkpoint(
        arguments.checkpoint,
        arguments.target,
        dialect=arguments.dialect,
        dtype=arguments.dtype,
        shards=arguments.shards,
        max_shard_size=arguments.max_shard_size,
        single_file=arguments.single_file,
        manifest=arguments.manifest,
        overwrite=arguments.overwrite,
    )
    return [overview(arguments.target).title], 0
