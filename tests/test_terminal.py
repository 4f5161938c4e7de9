"""What the commands look like on a real terminal (a pty), in a pipe, and where colours are not wanted."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.hollow import LLAMA, hollow_checkpoint, llama_shapes, pruned_checkpoint

from patchers.tables import Table, as_html, as_text, printable
from sharded_ckpt.report.terminal import write_page

ANSI = re.compile(r"\x1b\[[0-9;]*m")
COLORS = {"TERM": "xterm-256color", "COLUMNS": "120"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned_checkpoint(tmp_path_factory.mktemp("terminal") / "model")


def on_terminal(*argv: str, **environment: str) -> tuple[str, int]:
    """Run a command with a terminal as its output; return what it shows, and the exit code."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "sharded_ckpt", *argv],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=inherited | COLORS | environment,
    ) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
        assert process.communicate()[1] == b""
    os.close(ours)
    return shown.decode().replace("\r\n", "\n"), process.returncode


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except OSError:  # Linux says so where the other side is closed
        return b""


def in_pipe(*argv: str) -> str:
    done = subprocess.run([sys.executable, "-m", "sharded_ckpt", *argv], capture_output=True, text=True)
    return done.stdout


def words(text: str) -> list[str]:
    return ANSI.sub("", text).split()


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["inspect"], 0),
        (["plan", "--ranks", "2", "--memory", "120kB", "--length", "64"], 0),
        (["verify"], 0),
    ],
)
def test_a_terminal_shows_the_same_words_in_colours(argv: list[str], code: int, folder: Path) -> None:
    command = [argv[0], str(folder), *argv[1:]]
    shown = on_terminal(*command)
    assert shown[1] == code
    assert ANSI.search(shown[0])
    assert words(shown[0]) == words(in_pipe(*command))


def test_a_pipe_gets_plain_text(folder: Path) -> None:
    assert not ANSI.search(in_pipe("inspect", str(folder)))


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_can_be_refused(environment: dict[str, str], folder: Path) -> None:
    assert on_terminal("inspect", str(folder), **environment)[0] == in_pipe("inspect", str(folder))


@pytest.mark.parametrize("argv", [["inspect"], ["plan", "--ranks", "2"], ["verify"]])
def test_json_is_json_on_a_terminal_too(argv: list[str], folder: Path) -> None:
    shown, _ = on_terminal(argv[0], str(folder), *argv[1:], "--json")
    assert json.loads(shown)


class Terminal(io.StringIO):
    """A terminal that keeps what it is shown."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in (COLORS | {"COLUMNS": "40"}).items():
        monkeypatch.setenv(name, value)
    return Terminal()


def test_long_names_are_broken_and_never_cut(terminal: Terminal) -> None:
    name = "model.layers.{0-161}.self_attn.linear_attn.weight"
    write_page([Table([["tensors", "dtype"], [name, "BF16"]])], terminal)
    *header, begin, dtype, end = words(terminal.getvalue())
    assert (header, begin + end, dtype) == (["tensors", "dtype"], name, "BF16")


def test_numbers_stand_at_the_right_and_what_does_not_fit_is_red(terminal: Terminal) -> None:
    rows = [["rank", "bytes", "of budget"], ["0", "1.00 kB", "83%"], ["1-2", "10.00 kB", "103%"]]
    write_page(["the model does not fit: …", Table(rows)], terminal)
    red, _, head, *lines = terminal.getvalue().split("\n")
    assert red.startswith("\x1b[1;31mthe model does not fit\x1b[0m")
    assert ANSI.sub("", head) == "rank     bytes  of budget"
    assert ANSI.sub("", lines[0]) == "0      1.00 kB        83%"
    assert "\x1b[1;31m103%\x1b[0m" in lines[1]


def test_brackets_in_names_are_no_markup(terminal: Terminal) -> None:
    write_page(["[red]model[/red]", Table([["[bold]"], ["[link=x]y[/link]"]])], terminal)
    assert words(terminal.getvalue()) == ["[red]model[/red]", "[bold]", "[link=x]y[/link]"]


def test_without_rich_a_terminal_gets_plain_text(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    page = ["it fits", Table([["rank"], ["0"]])]
    write_page(page, terminal)
    assert terminal.getvalue() == f"{as_text(page)}\n"


EVIL = "model.\x1b]0;owned\x07\x1b[2J<script>alert(1)</script>.weight"


def test_names_in_files_command_neither_terminal_nor_notebook(
    tmp_path: Path, terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    from sharded_ckpt.cli import main
    from sharded_ckpt.report.overview import overview

    found = overview(hollow_checkpoint(tmp_path / "evil", {**llama_shapes(), EVIL: [2]}, LLAMA))
    write_page(found.page, terminal)
    for shown in (str(found), ANSI.sub("", terminal.getvalue()), found._repr_html_()):
        assert "\x1b" not in shown
        assert "\x07" not in shown
    assert r"model.\x1b]0;owned\x07\x1b[2J<script>" in str(found)
    assert "<script>" not in found._repr_html_()
    assert main(["inspect", str(tmp_path / "\x1b[2J")]) == 1
    assert r"\x1b[2J: no such file or directory" in capsys.readouterr().err


def test_only_what_acts_on_a_terminal_is_escaped() -> None:
    assert printable("größe 模型\nnext") == "größe 模型\nnext"
    assert as_html(["a\nb"]) == "<p>a<br>b</p>"
