"""Real weights, tied, in training over two ranks: the loss falls as it does in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.gloo import Gloo
from support.pipelines import stage_of
from transformers import AutoTokenizer

from sharded_ckpt import load_and_shard_model
from sharded_ckpt.demo import PARAGRAPH, WeightsUnavailableError, smollm2_folder

STEPS, TOKENS, LEARNING_RATE, MAX_NORM = 20, 24, 2e-5, 1.0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_loss_falls_over_20_steps_as_in_one_process(gloo: Gloo) -> None:
    try:
        checkpoint = smollm2_folder(progress=False)
    except WeightsUnavailableError as error:
        pytest.skip(str(error))
    ids = AutoTokenizer.from_pretrained(checkpoint)(PARAGRAPH, return_tensors="pt").input_ids[0]
    batch = ids[: 2 * TOKENS].view(2, TOKENS)  # two rows, so that there are two micro-batches
    alone = losses_of_one(checkpoint, batch)
    ranks = gloo.run_ok(losses_of_stage, checkpoint, batch, world_size=2, timeout=600)
    assert alone[-1] < alone[0] - 0.5
    for losses in ranks:
        assert losses == pytest.approx(alone, rel=1e-4)


def losses_of_one(checkpoint: Path, batch: torch.Tensor) -> list[float]:
    model = load_and_shard_model("auto", checkpoint, dtype=torch.float32, materialize=True)
    optimizer, losses = torch.optim.AdamW(model.parameters(), LEARNING_RATE), []
    for _ in range(STEPS):
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def losses_of_stage(checkpoint: Path, batch: torch.Tensor) -> list[float]:
    stage = stage_of(checkpoint, materialize=True, timeout=300)
    optimizer, losses = torch.optim.AdamW(stage.shard.parameters(), LEARNING_RATE), []
    for _ in range(STEPS):
        loss = stage.train_step({"input_ids": batch, "labels": batch}, micro_batches=2)
        stage.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
