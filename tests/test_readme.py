"""Every command and every example of the README does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import heterogeneous_checkpoint, tiny_checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^```bash\n(.*?)^```", README, flags=re.M | re.S)
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
DISTRIBUTED = next(example for example in EXAMPLES if "init_process_group" in example)


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


@pytest.mark.parametrize("number", [i for i, example in enumerate(EXAMPLES) if example is not DISTRIBUTED])
def test_example_runs(number: int, tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path)
    example = EXAMPLES[number].replace("path/to/checkpoint", str(heterogeneous_checkpoint(tmp_path)))
    example = example.replace("path/to/parent", str(parent)).replace("path/to", str(tmp_path))
    exec(compile(example, f"README example {number}", "exec"), {"tokens": torch.arange(6).reshape(1, 6)})


@pytest.mark.slow
def test_example_for_torchrun_runs_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED.replace("path/to/checkpoint", str(tiny_checkpoint(tmp_path))))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, check=True
    ).stdout
    for line in ("rank 0 owns (0, 1)", "rank 1 owns (2, 3)"):  # their newlines may meet
        assert line in output


def test_files_that_it_names_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    tree = re.findall(r"^  ?(\w+/) ", README.split("## Where things are")[1], flags=re.M)
    top = re.findall(r"^(\w+/) ", README.split("## Where things are")[1], flags=re.M)
    for path in [*links, *top, *(f"sharded_ckpt/{folder}" for folder in tree if folder not in top)]:
        assert (ROOT / path).exists(), path
