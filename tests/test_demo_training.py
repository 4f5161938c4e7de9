"""The worked example: a child is fine-tuned over ranks, loses one, goes on with one, and opens elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sharded_ckpt.cli import main
from sharded_ckpt.demo.fine_tuning import FineTuningResult, KindResult, RunResult


def some_result(resumed: RunResult) -> FineTuningResult:
    whole = RunResult(0, (4.0, 3.0, 2.0))
    kind = KindResult("full", 10, whole, "rank 1 was killed", resumed, 4.1, 1.9, "Paris.")
    return FineTuningResult(2, "without the attention of block 4", (kind,))


def test_a_resume_counts_as_exact_only_if_it_was_one_and_its_losses_agree() -> None:
    assert some_result(RunResult(1, (3.0, 2.00001))).is_exact
    assert not some_result(RunResult(1, (3.0, 2.1))).is_exact
    assert not some_result(RunResult(0, (4.0, 3.0, 2.0))).is_exact  # it had lost everything
    text = str(some_result(RunResult(1, (3.0, 2.0))))
    assert (
        "child without the attention of block 4, fine-tuned on 2 ranks, which lost one; resumed on 1" in text
    )
    assert "full: 'The capital of France is' -> 'Paris.'" in text


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_a_child_is_fine_tuned_through_the_loss_of_a_rank(tmp_path: Path, capsys) -> None:
    assert main(["demo", "--train", "--no-real-weights", "--json", "--cache", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["is_exact"]
    assert [one["kind"] for one in told["kinds"]] == ["full", "LoRA"]
    for one in told["kinds"]:
        assert "rank 1 of 2 failed: the process was killed by SIGKILL" in one["lost"]
        assert one["resumed"]["first_step"] in (4, 8)
        assert one["loss_after"] < one["loss_before"]
    assert told["kinds"][1]["trained"] < told["kinds"][0]["trained"] / 5
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".fine-tuning")] == []
