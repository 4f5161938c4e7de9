"""Trainings on ranks that were saved in the background go on as if nothing had been; killed, from before."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.async_saves import WAIT, GatedStorage
from support.gloo import Gloo, RankFailure
from support.iteration_dirs import steps_in
from support.tiny import heterogeneous_checkpoint
from support.trainings import PipelineTraining, config_of, equal, resume_and_train

from sharded_ckpt.loading.verbs import load_and_shard_model
from sharded_ckpt.training.checkpointing import AsyncCallsQueue, maybe_finalize_async_save

BLOCKS = [(2, 96), ("no_op", 48), (1, "no_op"), (4, 32)]


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return heterogeneous_checkpoint(tmp_path_factory.mktemp("child"), blocks=BLOCKS)


def save_while_training(checkpoint: Path, config: Any, first: int, second: int) -> tuple[Any, list[float]]:
    """Train, begin to save, train on meanwhile; return everything at the end, and the losses."""
    torch.manual_seed(100)
    with AsyncCallsQueue() as queue:
        training = PipelineTraining(checkpoint, config, async_calls_queue=queue).train(first)
        training.save(storage=(storage := GatedStorage()))
        assert storage.reached.wait(WAIT)
        training.train(second)
        maybe_finalize_async_save(training.state, config)
        assert not os.path.exists(os.path.join(config.save, "latest_train_state.json"))
        storage.go_on.set()
    return training.everything(), training.losses[first:]


def test_a_resume_from_a_background_save_repeats_the_losses_bit_for_bit(
    gloo: Gloo, child: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path, async_save=True, also_save_hf_checkpoint=True)
    straight = gloo.run_ok(save_while_training, child, config, 2, 3)
    resumed = gloo.run_ok(resume_and_train, child, config_of(tmp_path), 3)
    for (at_end, losses), (_, at_end_again, losses_again, loaded) in zip(straight, resumed, strict=True):
        assert loaded == (2, 200)
        assert losses_again == losses
        assert equal(at_end_again, at_end)
    saved = load_and_shard_model("auto", tmp_path / "iter_0000002" / "hf")
    assert len(saved.model.layers) == len(BLOCKS)


def die_while_saving(checkpoint: Path, config: Any) -> None:
    """Save a first step; be killed, all ranks at once, while the second one is being written."""
    torch.manual_seed(100)
    with AsyncCallsQueue() as queue:
        training = PipelineTraining(checkpoint, config, async_calls_queue=queue).train(1).save()
        maybe_finalize_async_save(training.state, config, blocking=True)
        training.train(1).save(storage=(storage := GatedStorage()))
        assert storage.reached.wait(WAIT)
        os.kill(os.getpid(), signal.SIGKILL)


def test_who_is_killed_while_saving_goes_on_from_the_save_before(
    gloo: Gloo, child: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path, async_save=True)
    for failure in gloo.run(die_while_saving, child, config):
        assert isinstance(failure, RankFailure)
        assert failure.kind == "died"
    assert steps_in(tmp_path) == [1]
    for *_, loaded in gloo.run_ok(resume_and_train, child, config_of(tmp_path), 1):
        assert loaded == (1, 100)
