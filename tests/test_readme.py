"""The README's commands are those that CI runs, and what it names exists; test_docs.py runs its examples."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^```bash\n(.*?)^```", README, flags=re.M | re.S)


def test_set_up_is_two_commands() -> None:
    assert [command.strip() for command in COMMANDS] == [
        'python -m pip install -e ".[demo]" && sharded-ckpt demo',
        'python -m pip install -e ".[test]" && python -m pytest',
    ]


def test_ci_runs_both_word_for_word() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    function = script[script.index("readme_command()") : script.index("for extra")]
    shell = ["bash", "-c", f"{function}\nreadme_command demo; readme_command test"]
    found = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found == "".join(COMMANDS)
    assert 'bash -euo pipefail -c "$command"' in script


def test_fast_tests_can_be_chosen() -> None:
    assert '`python -m pytest -m "not slow"`' in README
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "not slow",
        "--collect-only",
        "-q",
        "tests/test_names.py",
    ]
    assert (
        "tests collected"
        in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )


def test_files_that_it_names_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    tree = re.findall(r"^  ?(\w+/) ", README.split("## Where things are")[1], flags=re.M)
    top = re.findall(r"^(\w+/) ", README.split("## Where things are")[1], flags=re.M)
    for path in [*links, *top, *(f"sharded_ckpt/{folder}" for folder in tree if folder not in top)]:
        assert (ROOT / path).exists(), path
