"""Micro-batches are chosen by measured times, and the choice changes no token."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from support.gloo import Gloo
from support.pipelines import generated
from support.tiny import tiny_checkpoint

from sharded_ckpt import PipelineStage, load_and_shard_model
from sharded_ckpt.pipeline.schedule import best_rows, sizes_to_measure, step_seconds
from sharded_ckpt.pipeline.step_times import measured_rows

MEASURED = {2: 138.0, 3: 145.0, 4: 248.0, 8: 355.0, 12: 460.0, 16: 330.0}  # a real one; ms


def test_an_uneven_cut_is_chosen_where_it_is_faster() -> None:
    assert best_rows(8, [MEASURED, MEASURED]) == [3, 3, 2]
    assert best_rows(24, [MEASURED | {24: 900.0}] * 2) == [16, 8]


def test_one_micro_batch_is_kept_where_more_gain_nothing() -> None:
    flat = {1: 10.0, 2: 10.0, 4: 10.0}
    assert best_rows(4, [flat, flat]) == [4]


@pytest.mark.parametrize("batch", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("stages", [2, 3])
def test_no_cut_is_much_faster_and_none_as_fast_has_fewer_micro_batches(batch: int, stages: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    sizes = sizes_to_measure(batch, stages)
    times = [
        dict(zip(sizes, torch.rand(len(sizes), generator=generator).add(0.2).tolist(), strict=True))
        for _ in range(stages)
    ]
    every = (
        rows
        for count in range(1, 2 * stages + 1)
        for rows in itertools.combinations_with_replacement(sizes, count)
        if sum(rows) == batch
    )
    found = [(step_seconds(rows, times), len(rows)) for rows in every]
    best = min(seconds for seconds, _ in found)
    chosen = best_rows(batch, times)
    assert step_seconds(chosen, times) <= 1.1 * best
    assert len(chosen) == min(count for seconds, count in found if seconds <= 1.1 * best)


def test_a_gain_that_may_be_noise_is_worth_no_more_micro_batches() -> None:
    assert best_rows(8, [{4: 27.0, 8: 58.0}]) == [8]
    assert best_rows(8, [{4: 24.0, 8: 58.0}]) == [4, 4]


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
        rows = measured_rows(stage, 4, 20)
        first = len(passes)
        assert measured_rows(stage, 4, 30) == rows  # both are up to 32 tokens
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
