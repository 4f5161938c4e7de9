"""Micro-batches are chosen by measured times, and the choice changes no token."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gloo import Gloo
from support.pipelines import generated, stage_of
from support.tiny import tiny_checkpoint

from patchers.errors import ConfigError
from sharded_ckpt import PipelineStage, load_and_shard_model
from sharded_ckpt.pipeline.micro_batches import rows_of_step
from sharded_ckpt.pipeline.schedule import best_rows, pass_seconds, sizes_to_measure, step_seconds

MEASURED = {2: 138.0, 3: 145.0, 4: 248.0, 8: 355.0, 12: 460.0, 16: 330.0}  # a real one; ms


def test_an_uneven_cut_is_chosen_where_it_is_faster() -> None:
    assert best_rows(8, [MEASURED, MEASURED], most=4) == [3, 3, 2]
    assert best_rows(24, [MEASURED | {24: 900.0}] * 2, most=4) == [16, 8]


def test_one_micro_batch_is_kept_where_more_gain_nothing() -> None:
    flat = {1: 10.0, 2: 10.0, 4: 10.0}
    assert best_rows(4, [flat, flat], most=4) == [4]


@pytest.mark.parametrize("batch", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("seconds", [step_seconds, pass_seconds])
def test_no_cut_of_two_sizes_is_much_faster_and_none_as_fast_has_fewer_micro_batches(
    batch: int, stages: int, seconds: Any
) -> None:
    generator, most = torch.Generator().manual_seed(batch), 2 * stages
    sizes = sizes_to_measure(batch, most)
    times = [
        dict(zip(sizes, torch.rand(len(sizes), generator=generator).add(0.2).tolist(), strict=True))
        for _ in range(stages)
    ]
    every = (
        sorted(rows, reverse=True)
        for count in range(1, most + 1)
        for rows in itertools.combinations_with_replacement(sizes, count)
        if sum(rows) == batch and len(set(rows)) <= 2
    )
    found = [(seconds(rows, times), len(rows)) for rows in every]
    best = min(taken for taken, _ in found)
    chosen = best_rows(batch, times, most, seconds)
    assert seconds(chosen, times) <= 1.1 * best
    assert len(chosen) == min(count for taken, count in found if taken <= 1.1 * best)


def test_a_large_batch_over_many_stages_is_cut_at_once() -> None:
    sizes = sizes_to_measure(256, most=32)
    began = time.perf_counter()
    rows = best_rows(256, [{size: 1.0 + size for size in sizes}] * 8, 32, pass_seconds)
    assert time.perf_counter() - began < 2  # all sums of these sizes would take hours
    assert sum(rows) == 256


def test_a_gain_that_may_be_noise_is_worth_no_more_micro_batches() -> None:
    assert best_rows(8, [{4: 27.0, 8: 58.0}], most=2) == [8]
    assert best_rows(8, [{4: 24.0, 8: 58.0}], most=2) == [4, 4]


def test_a_batch_is_measured_once(gloo: Gloo, tmp_path: Path) -> None:
    counts = gloo.run_ok(measured_twice, tiny_checkpoint(tmp_path), world_size=2)
    assert counts == [counts[0]] * 2
    assert counts[0] > 0


def measured_twice(folder: Path) -> int:
    """Return how many passes a rank makes to measure; another batch of the size costs none."""
    stage = PipelineStage(load_and_shard_model("auto", folder))
    passes: list[int] = []
    run = stage.body.run
    vars(stage.body)["run"] = lambda *args, **kwargs: (passes.append(1), run(*args, **kwargs))[1]
    with torch.no_grad():
        rows = rows_of_step(stage, 4, 20)
        first = len(passes)
        assert rows_of_step(stage, 4, 30) == rows  # both are up to 32 tokens
    assert len(passes) == first
    return first


def test_measured_micro_batches_give_the_same_tokens(gloo: Gloo, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    prompts = torch.arange(4, 34).reshape(5, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    call = {"inputs": prompts, "micro_batches": "auto", **options}
    tokens = load_and_shard_model("auto", checkpoint, dtype=torch.float32).generate(prompts, **options)
    for rank in gloo.run_ok(generated, checkpoint, None, [call], world_size=3):
        assert torch.equal(rank[0], tokens)


def test_measured_micro_batches_give_the_same_logits_and_scores(gloo: Gloo, tmp_path: Path) -> None:
    checkpoint, ids = tiny_checkpoint(tmp_path), torch.arange(4, 46).reshape(6, 7)
    with torch.no_grad():
        model = load_and_shard_model("auto", checkpoint, dtype=torch.float32)
        expected, loss = model(ids).logits, model(ids, labels=ids).loss.item()
    for logits, with_labels, scored in gloo.run_ok(run_measured, checkpoint, ids):
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert with_labels == pytest.approx(loss, rel=1e-5)
        assert scored == pytest.approx(loss, rel=1e-5)


def run_measured(checkpoint: Path, ids: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    stage = stage_of(checkpoint)
    output = stage(ids, micro_batches="auto", broadcast=True)
    of_all = stage(ids, labels=ids, micro_batches="auto", broadcast=True)  # a loss is of the whole batch
    scored = stage.score([{"input_ids": ids}] * 2, micro_batches="auto")
    return output.logits, of_all.loss.item(), scored.loss


def test_a_training_step_takes_no_measured_micro_batches(tmp_path: Path) -> None:
    stage = PipelineStage(load_and_shard_model("auto", tiny_checkpoint(tmp_path)))
    ids = torch.arange(4, 46).reshape(6, 7)
    with pytest.raises(ConfigError, match="micro_batches is 'auto'; say how many, or the rows of each"):
        stage.train_step({"input_ids": ids, "labels": ids}, micro_batches="auto")
    with pytest.raises(ConfigError, match="micro_batches is 'two'; say how many"):
        stage.generate(ids, micro_batches="two", max_new_tokens=1)
