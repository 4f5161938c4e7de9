"""The command `sharded-ckpt`.

Each subcommand is a module with two functions, imported when it is asked for, so that the light commands
answer at once: `configure(parser)` adds its options, `run(arguments, say)` does the work and returns what is
to be printed and the exit code. `say` tells the user something at once, on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from patchers.errors import ShardedCkptError
from patchers.tables import Page, printable
from sharded_ckpt import __version__

OK, FAILED, USAGE = 0, 1, 2
"""Exit codes: done and well; something is wrong; the command line is wrong (argparse's own)."""

_EPILOG = """\
exit codes: 0 if all is well, 1 if something is wrong, 2 if the command line is

example:
  sharded-ckpt demo --ranks 2
"""


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: As it is typed.
        summary: One line for the help.
        module: Where it is implemented.
    """

    name: str
    summary: str
    module: str


COMMANDS = (
    Command("inspect", "show the blocks and tensors of a checkpoint", "sharded_ckpt.commands.inspect"),
    Command("verify", "check a checkpoint: index, headers, files, values", "sharded_ckpt.commands.verify"),
    Command("plan", "show which rank would own which blocks", "sharded_ckpt.commands.plan"),
    Command("diff", "compare two checkpoints, block by block", "sharded_ckpt.commands.diff"),
    Command("convert", "write a checkpoint anew, in other words or files", "sharded_ckpt.commands.convert"),
    Command("infer-config", "read block configs off the tensors", "sharded_ckpt.commands.infer_config"),
    Command("generate", "continue prompts over the ranks of torchrun", "sharded_ckpt.commands.generate"),
    Command("demo", "load, shrink, save and reload a real model over ranks", "sharded_ckpt.demo.command"),
)


class CommandModule(Protocol):
    """What the module of a subcommand has."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add description, options and an example."""

    def run(self, arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[str | Page, int]:
        """Return what is to be printed, and the exit code; a page is coloured on a terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; a wrong command line exits at once, with 2.

    Args:
        argv: The arguments after the program's name; by default those of this process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in argv if not word.startswith("-")), None)
    chosen = next((command for command in COMMANDS if command.name == name), None)
    module: Any = importlib.import_module(chosen.module) if chosen else None
    arguments = _parser(chosen, module).parse_args(argv)
    try:
        said, code = module.run(arguments, _say)
        _write(said)
        return code
    except BrokenPipeError:  # the reader has seen enough: `sharded-ckpt … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ShardedCkptError, OSError) as error:
        _say(f"sharded-ckpt {arguments.command}: {error}")
        return FAILED
    except KeyboardInterrupt:
        _say(f"sharded-ckpt {arguments.command}: interrupted")
        return FAILED


def _parser(chosen: Command | None, module: CommandModule | None) -> argparse.ArgumentParser:
    """Build the parser, with the options of the chosen command only: those of the others cost imports."""
    parser = argparse.ArgumentParser(
        prog="sharded-ckpt",
        description="Large decoder models whose blocks are not all alike, sharded by blocks over ranks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in COMMANDS:
        added = commands.add_parser(
            command.name, help=command.summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if command is chosen and module is not None:
            module.configure(added)
    return parser


def _write(said: str | Page) -> None:
    stream: TextIO | None = sys.stdout
    if stream is None:  # was closed: `sharded-ckpt … >&-`
        return
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")  # names are anybody's, and not all streams are UTF-8
    if not isinstance(said, str):
        from sharded_ckpt.report.terminal import write_page

        write_page(said, stream)
    elif said:  # of several ranks, one speaks
        stream.write(f"{said}\n")
    stream.flush()


def _say(text: str) -> None:
    stream: TextIO | None = sys.stderr
    if stream is not None:
        stream.write(f"{printable(text)}\n")
        stream.flush()
