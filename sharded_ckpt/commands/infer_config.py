"""The subcommand `sharded-ckpt infer-config`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sharded_ckpt.commands.arguments import add_checkpoint, add_dialect, add_json, as_json

DESCRIPTION = """\
Read the block configs of a checkpoint off the shapes of its tensors, and print the fields that say them
in a config.json. For models that were pruned in memory, or whose config is lost or wrong.
"""
EPILOG = """\
exit code: 0, or 1 if the tensors do not tell what a block is

example:
  sharded-ckpt infer-config path/to/checkpoint --dialect per-layer --write
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add what `infer-config` can be told."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_checkpoint(parser)
    add_dialect(parser, "in which to say the blocks (default: that of the config, else anymodel)")
    parser.add_argument(
        "--write",
        action="store_true",
        help="put the fields into the config.json of a local directory, in place of what it says of blocks",
    )
    add_json(parser, "print JSON, as is done anyway")


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[str, int]:
    """Infer the block configs.

    Raises:
        BlockConfigError: The tensors do not tell what a block is, or the dialect cannot say it.
        CheckpointError: The checkpoint cannot be read, or has no config.
        ConfigError: The config of something else than a local directory is to be written.
    """
    from patchers.dialects import CONFIG_FIELDS
    from patchers.inference import contradictions, infer_block_configs
    from patchers.names import fold_indices
    from sharded_ckpt.checkpoint.reader import open_checkpoint
    from sharded_ckpt.checkpoint.source import read_config
    from sharded_ckpt.saving.carried_files import config_saying

    reader = open_checkpoint(arguments.checkpoint, lambda index: index)
    headers, raw = reader.headers(), read_config(reader.source)
    reader.close()
    blocks = infer_block_configs(headers, raw)
    changed = config_saying(raw, blocks, arguments.dialect)
    if wrong := contradictions(raw, blocks):
        say(f"the config says something else of blocks {fold_indices(wrong)} than their tensors")
    if arguments.write:
        _write(reader.source, changed, say)
    return as_json({field: changed[field] for field in CONFIG_FIELDS if field in changed}), 0


def _write(source: Any, config: dict[str, Any], say: Callable[[str], None]) -> None:
    from patchers.errors import ConfigError
    from sharded_ckpt.checkpoint.local import LocalSource
    from sharded_ckpt.checkpoint.manifest import MANIFEST_FILE
    from sharded_ckpt.checkpoint.publish import transaction

    if not isinstance(source, LocalSource):
        raise ConfigError(f"{source.location}: only the config.json of a local directory can be written")
    with transaction(source.directory, manifest=source.exists(MANIFEST_FILE)) as save:
        save.write_json("config.json", config)
    say(f"{source.location}/config.json: written")
