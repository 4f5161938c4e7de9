"""The pages of the documentation: their blocks of code, and how each kind of block is run."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharded_ckpt.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SECONDS = 240


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its first line of code, from 1."""

    page: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_session(self) -> bool:
        """Python as typed at its prompt, with what it answers."""
        return self.language == "python" and self.code.startswith(">>> ")

    @property
    def is_for_ranks(self) -> bool:
        """A script that torchrun starts."""
        return self.language == "python" and "init_process_group()" in self.code and not self.file

    @property
    def file(self) -> str | None:
        """The file that the block is: its first line is a comment with the name."""
        found = re.match(r"# (\w+\.py)\n", self.code)
        return found and found[1]

    @property
    def is_script(self) -> bool:
        """Python that is not typed at a prompt."""
        return self.language == "python" and not self.is_session and not self.is_for_ranks


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(.*)\n((?s:.*?))^```$", text, flags=re.MULTILINE)
    return [
        Block(name_of(page), text.count("\n", 0, each.start(2)) + 1, each.group(1), each.group(2))
        for each in found
    ]


def run_session(block: Block, names: dict[str, Any]) -> None:
    """Run what is typed, and compare what is answered; `names` are those of the page, and grow."""
    test = doctest.DocTestParser().get_doctest(block.code, names, str(block), block.page, block.line - 1)
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=said.append, clear_globs=False).failed
    assert not failed, "".join(said)
    names |= test.globs


def run_script(block: Block, names: dict[str, Any]) -> None:
    """Run Python that is not typed at a prompt; `names` are those of the page, and grow.

    A block that is a file is written where the page runs.
    """
    if block.file:
        Path(block.file).write_text(block.code, encoding="utf-8")
        return
    exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), names)


def run_console(block: Block) -> None:
    """Run each line that follows a `$`, and compare what it prints."""
    for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        said = _typed(command)
        matches = doctest.OutputChecker().check_output(expected, said, doctest.ELLIPSIS)
        assert matches, f"{block}: $ {command}\n{said}"


def run_bash(block: Block, folder: Path) -> str:
    """Run a block of bash in a folder; it must succeed. Returns what it prints."""
    return _shell(block.code, folder, check=True)


def run_under_torchrun(block: Block, folder: Path) -> str:
    """Run a script on two ranks in a folder; it must succeed. Returns what it prints."""
    (folder / "script.py").write_text(block.code, encoding="utf-8")
    return _shell("torchrun --standalone --nproc-per-node 2 script.py", folder, check=True)


def _typed(command: str) -> str:
    program, *argv = shlex.split(command)
    if program != "sharded-ckpt":
        return _shell(command, Path.cwd(), check=False)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        main(argv)
    return out.getvalue()


def _shell(command: str, folder: Path, *, check: bool) -> str:
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": programs, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if check else subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert not check or done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
    return done.stdout
