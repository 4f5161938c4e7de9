"""The command `sharded-ckpt`: help, exit codes, and errors as one line of text."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest

import sharded_ckpt
from patchers.errors import CheckpointError
from sharded_ckpt import cli
from sharded_ckpt.cli import COMMANDS, Command, main


def test_the_console_script_is_main() -> None:
    (script,) = entry_points(group="console_scripts", name="sharded-ckpt")
    assert script.load() is main


def test_help_lists_every_command_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"    {command.name}" in text
        assert command.summary in text
    assert "example:\n  sharded-ckpt demo --ranks 2" in text


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_help_of_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"example:\n  sharded-ckpt {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"sharded-ckpt {sharded_ckpt.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "the following arguments are required: command"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["demo", "--rank"], "argument --ranks: expected one argument"),
        (["demo", "--ranks", "0"], "argument --ranks: '0' is not a positive whole number"),
        (["demo", "--ranks", "two"], "argument --ranks: 'two' is not a positive whole number"),
        (["demo", "--jsno"], "unrecognized arguments: --jsno"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "usage: sharded-ckpt" in said.err
    assert text in said.err


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\n"
        "from sharded_ckpt.cli import main\n"
        "from sharded_ckpt.cli import COMMANDS\n"
        "for argv in (['--help'], *([command.name, '--help'] for command in COMMANDS)):\n"
        "    with contextlib.suppress(SystemExit): main(argv)\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


def test_an_error_is_one_line_on_stderr_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "tiny-random-llama"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    assert main(["demo", "--no-real-weights", "--cache", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1] == (
        f"sharded-ckpt demo: {taken} exists and is not a folder that the demo made: it has no made.json. "
        "Move it away, or name another place."
    )


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--no-real-weights", "--cache", str(tmp_path / "file")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("sharded-ckpt demo: ")
    assert str(tmp_path / "file") in last


# --- what every later command can rely on


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], tuple[str, int]]], None]:
    """Register `sharded-ckpt greet NAME`, which does what it is told to."""

    def register(work: Callable[[], tuple[str, int]]) -> None:
        module = ModuleType("greeting_command")

        def configure(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("name")

        def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[str, int]:
            say(f"about to greet {arguments.name}")
            return work()

        module.configure, module.run = configure, run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "COMMANDS", (*COMMANDS, Command("greet", "say hello", module.__name__)))

    return register


def test_text_goes_to_stdout_and_words_on_the_way_to_stderr(
    registered: Callable[[Callable[[], tuple[str, int]]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    registered(lambda: ("hello", 1))
    assert main(["greet", "world"]) == 1
    assert capsys.readouterr() == ("hello\n", "about to greet world\n")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (CheckpointError("a.safetensors: broken"), "a.safetensors: broken"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_errors_are_told_and_end_with_1(
    registered: Callable[[Callable[[], tuple[str, int]]], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    text: str,
) -> None:
    def work() -> tuple[str, int]:
        raise error

    registered(work)
    assert main(["greet", "world"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"sharded-ckpt greet: {text}"


def test_a_bug_is_not_told_as_if_it_were_the_users(
    registered: Callable[[Callable[[], tuple[str, int]]], None],
) -> None:
    registered(lambda: ("1 / 0", 1 // 0))
    with pytest.raises(ZeroDivisionError):
        main(["greet", "world"])


def talking(words: str) -> str:
    """Return a program that runs `sharded-ckpt talk`, which says the words."""
    return (
        "import sys, types\n"
        "from sharded_ckpt import cli\n"
        "module = types.ModuleType('talker')\n"
        "module.configure = lambda parser: None\n"
        f"module.run = lambda arguments, say: ({words}, 0)\n"
        "sys.modules['talker'] = module\n"
        "cli.COMMANDS = (cli.Command('talk', '', 'talker'),)\n"
        "sys.exit(cli.main(['talk']))\n"
    )


@pytest.mark.parametrize("words", [r"'\xfc'", r"['\xfc']"], ids=["text", "page"])
def test_what_a_stream_cannot_show_is_shown_by_its_escape(words: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", talking(words)], capture_output=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\xfc\n", b"")


def test_nothing_is_said_to_a_stream_that_is_closed() -> None:
    command = [sys.executable, "-c", talking("['word']")]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_reader_that_leaves_early_makes_no_traceback(tmp_path: Path) -> None:
    code = talking("'word ' * 1_000_000")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
