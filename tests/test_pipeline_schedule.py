"""Micro-batches are chosen by measured times, and the choice changes no token."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from support.gloo import Gloo
from support.pipelines import generated
from support.tiny import tiny_checkpoint

from sharded_ckpt import load_and_shard_model
from sharded_ckpt.pipeline.schedule import best_rows, sizes_to_measure, step_seconds

MEASURED = {2: 138.0, 3: 145.0, 4: 248.0, 8: 355.0, 12: 460.0, 16: 330.0}  # a real one; ms


def test_an_uneven_cut_is_chosen_where_it_is_faster() -> None:
    assert best_rows(8, [MEASURED, MEASURED]) == [3, 3, 2]
    assert best_rows(24, [MEASURED | {24: 900.0}] * 2) == [16, 8]


def test_one_micro_batch_is_kept_where_more_gain_nothing() -> None:
    flat = {1: 10.0, 2: 10.0, 4: 10.0}
    assert best_rows(4, [flat, flat]) == [4]


@pytest.mark.parametrize("batch", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("stages", [2, 3])
def test_no_cut_of_the_measured_sizes_is_faster(batch: int, stages: int) -> None:
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
    best = min(step_seconds(rows, times) for rows in every)
    assert step_seconds(best_rows(batch, times), times) == best


def test_measured_micro_batches_give_the_same_tokens(gloo: Gloo, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    prompts = torch.arange(4, 34).reshape(5, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    call = {"inputs": prompts, "micro_batches": "auto", **options}
    tokens = load_and_shard_model("auto", checkpoint, dtype=torch.float32).generate(prompts, **options)
    for rank in gloo.run_ok(generated, checkpoint, None, [call], world_size=3):
        assert torch.equal(rank[0], tokens)
