"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_checkpoint(parser: argparse.ArgumentParser, name: str = "checkpoint") -> None:
    """Add a checkpoint as a positional argument."""
    parser.add_argument(
        name,
        help="a directory, a file in it, a hub id such as org/name or org/name@revision, or a URL",
    )


def add_json(parser: argparse.ArgumentParser, help: str = "print JSON instead of text") -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help=help)


def add_dialect(parser: argparse.ArgumentParser, help: str) -> None:
    """Add `--dialect`."""
    from patchers.dialects import Dialect

    names = [dialect.value for dialect in Dialect]
    parser.add_argument("--dialect", choices=names, metavar="DIALECT", help=f"{help}: {', '.join(names)}")


def as_json(value: Any) -> str:
    """Set out plain data as JSON, as all commands print it."""
    return json.dumps(value, indent=2, allow_nan=False)


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number
