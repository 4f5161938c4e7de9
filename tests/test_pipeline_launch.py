"""The command line under the launchers that people use, and without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_ckpt.demo.tiny import tiny_folder

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "generate.py"
PROMPTS = ["The sea is", "A"]
LAUNCHERS = {
    "alone": [],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
    "accelerate": [
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "-m",
    ],
}
LOST = """
import os, signal, sys, torch, torch.distributed as dist
from sharded_ckpt import PipelineStage, default_runtime, load_and_shard_model
dist.init_process_group("gloo")
runtime = default_runtime(device="cpu", timeout=8)
stage = PipelineStage(load_and_shard_model("auto", sys.argv[1], runtime=runtime), runtime)
if dist.get_rank() == 1:
    stage.shard.lm_head.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
stage.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("launch") / "tiny-random-llama")


def environment() -> dict[str, str]:
    """One thread a rank, and no accelerator, so that every launcher runs the same arithmetic."""
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def launch(module: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *module, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
    )


@pytest.mark.slow
def test_the_command_gives_the_same_texts_under_every_launcher(model: Path) -> None:
    arguments = ["generate", "--model", str(model), "--device", "cpu", "--max-new-tokens", "6", "--json"]
    arguments += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    said = {}
    for name, launcher in LAUNCHERS.items():
        done = launch([*launcher, "sharded_ckpt"], *arguments)
        assert done.returncode == 0, done.stderr
        said[name] = json.loads(done.stdout)
    assert said["torchrun"] == said["accelerate"] == said["alone"]
    assert [each["prompt"] for each in said["alone"]] == PROMPTS
    assert all(each["text"] for each in said["alone"])


@pytest.mark.slow
def test_the_example_script_runs_alone_and_under_torchrun(model: Path) -> None:
    said = []
    for launcher in ([], LAUNCHERS["torchrun"][:-1]):
        started = ["-m", *launcher] if launcher else []
        command = [sys.executable, *started, str(SCRIPT), str(model), PROMPTS[0]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment())
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines()[-1])
    assert said[0] == said[1]
    assert said[0].startswith(PROMPTS[0])


@pytest.mark.slow
def test_under_torchrun_the_survivor_still_says_who_was_lost(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "lost.py"
    script.write_text(LOST)
    done = launch([*LAUNCHERS["torchrun"][:-1], str(script)], str(model))
    assert done.returncode != 0
    assert "generating failed on rank 1 of 2: no sign of life" in done.stderr


def test_a_wrong_model_is_told_in_one_line(tmp_path: Path) -> None:
    done = launch(["sharded_ckpt"], "generate", "--model", str(tmp_path), "--prompt", "x", "--device", "cpu")
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"sharded-ckpt generate: {tmp_path}" in done.stderr
