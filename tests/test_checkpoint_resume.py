"""Trainings on ranks: interrupted, they go on as if they had not been, on as many ranks or on others."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.gloo import Gloo, RankFailure
from support.iteration_dirs import steps_in
from support.storages import DeadlyStorage, FaultyStorage
from support.tiny import heterogeneous_checkpoint, tiny_checkpoint
from support.trainings import PipelineTraining, config_of, equal, resume_and_train, train_save_train

from sharded_ckpt.training.checkpointing import CheckpointSaveContext, create_checkpoint_manager

BLOCKS = [(2, 96), ("no_op", 48), (1, "no_op"), (4, 32)]


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return heterogeneous_checkpoint(tmp_path_factory.mktemp("child"), blocks=BLOCKS)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tied"), layers=3, tied=True)


def united(said: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Put together what ranks have; copies must agree."""
    whole: dict[str, torch.Tensor] = {}
    for tensors in said:
        for name, tensor in tensors.items():
            assert torch.equal(whole.setdefault(name, tensor), tensor), name
    return whole


def test_on_the_same_ranks_everything_goes_on_bit_for_bit(gloo: Gloo, child: Path, tmp_path: Path) -> None:
    """F1: parameters, optimizer, scheduler, random numbers, and so the order of the data, which they draw."""
    straight = gloo.run_ok(train_save_train, child, config_of(tmp_path), (2, 3), world_size=2)
    resumed = gloo.run_ok(resume_and_train, child, config_of(tmp_path), 3, world_size=2)
    for (at_save, at_end, losses), (at_load, at_end_again, losses_again, loaded) in zip(
        straight, resumed, strict=True
    ):
        assert loaded == (2, 200)
        assert losses_again == losses
        assert equal(at_load, at_save)
        assert equal(at_end_again, at_end)


@pytest.mark.parametrize("fixture", ["child", "tied"])
def test_on_other_ranks_all_goes_on_that_does_not_depend_on_them(
    gloo: Gloo, request: pytest.FixtureRequest, tmp_path: Path, fixture: str
) -> None:
    """From 1 rank to 2 to 3 to 1: weights, optimizer, schedule and progress are what was saved."""
    model = request.getfixturevalue(fixture)
    straight = gloo.run_ok(train_save_train, model, config_of(tmp_path), (2, 2), False, world_size=1)
    before = straight[0][0]
    config = config_of(tmp_path, most_recent_k=1)
    for ranks in (2, 3, 1):
        resumed = gloo.run_ok(resume_save_train, model, config, world_size=ranks)
        assert equal(united([said["tensors"] for said, _ in resumed]), united([before["tensors"]]))
        for said, losses in resumed:
            assert said["progress"] == before["progress"]
            assert losses == pytest.approx(straight[0][2], rel=1e-5)
            if said["lr"]:
                assert (said["lr"], said["scheduler"]) == (before["lr"], before["scheduler"])


def resume_save_train(checkpoint: Path, config: Any) -> tuple[Any, list[float]]:
    """Load, save what was loaded, as it is, then train on."""
    training = PipelineTraining(checkpoint, config, drawn=False)
    training.load()
    at_load = training.everything()
    training.save()
    return at_load, training.train(2).losses


def test_random_numbers_of_other_ranks_are_not_taken_and_that_is_said(
    gloo: Gloo, child: Path, tmp_path: Path
) -> None:
    """E11: more ranks than saved, and fewer."""
    gloo.run_ok(train_save_train, child, config_of(tmp_path), (1, 0), world_size=2)
    for ranks in (1, 3):
        for kept, text in gloo.run_ok(random_numbers_at_load, child, config_of(tmp_path), world_size=ranks):
            assert kept
            assert f"saved on 2 ranks, loaded on {ranks}: the random number generators stay" in text


def random_numbers_at_load(checkpoint: Path, config: Any) -> tuple[bool, str]:
    import logging

    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sharded_ckpt").addHandler(handler)
    training = PipelineTraining(checkpoint, config)
    before = torch.get_rng_state()
    training.load()
    return torch.equal(torch.get_rng_state(), before), "\n".join(texts)


# What fails ------------------------------------------------------------------------------------------------


def save_again(checkpoint: Path, config: Any, broken: int, kind: str) -> str:
    """Save step 1, then step 2 while something happens to one rank; say what all were told."""
    timeout = 8.0 if kind == "dies" else 60.0
    training = PipelineTraining(checkpoint, config, drawn=False, timeout=timeout).train(1).save().train(1)
    options: dict[str, Any] = {}
    if dist.get_rank() == broken:
        if kind == "fails":
            options["storage"] = FaultyStorage(4, OSError(errno.EIO, "Input/output error"), durable=False)
        elif kind == "dies":
            options["storage"] = DeadlyStorage(4)
        elif kind == "other step":
            training.state.train_state.step = 3
        elif kind == "other place":
            training.state.cfg = config_of(Path(config.save) / "elsewhere")
    training.save(**options)
    return "saved"


@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_that_fails_fails_all_and_the_step_before_counts(
    gloo: Gloo, child: Path, tmp_path: Path, broken: int
) -> None:
    results = gloo.run(save_again, child, config_of(tmp_path), broken, "fails", world_size=2)
    assert {result.type for result in results} == {"CollectiveError"}
    assert len({result.text for result in results}) == 1
    assert f"rank {broken}" in results[0].text
    assert "Input/output error" in results[0].text
    assert goes_on_from(gloo, child, tmp_path) == (1, 100)


@pytest.mark.slow
def test_a_rank_that_is_killed_in_a_save_leaves_the_step_before(
    gloo: Gloo, child: Path, tmp_path: Path
) -> None:
    """F2, E2: a crash in the save of step 2 resumes from step 1, and the next save removes the litter."""
    results = gloo.run(save_again, child, config_of(tmp_path), 1, "dies", world_size=2, lost=[1])
    assert isinstance(results[1], RankFailure)
    assert (results[1].kind, results[0].type) == ("died", "CollectiveError")
    assert goes_on_from(gloo, child, tmp_path) == (1, 100)


def goes_on_from(gloo: Gloo, checkpoint: Path, run: Path) -> tuple[int, float]:
    """Resume, take a step and save it: nothing is in the way of that."""
    loaded = gloo.run_ok(resume_train_save, checkpoint, config_of(run), world_size=2)
    assert steps_in(run)[-1] == loaded[0][0] + 1
    assert [name for name in os.listdir(run) if name.startswith(".")] == []
    return loaded[0]


def resume_train_save(checkpoint: Path, config: Any) -> tuple[int, float]:
    training = PipelineTraining(checkpoint, config, drawn=False)
    loaded = training.load()
    training.train(1).save()
    return loaded


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "other step",
            r"disagree on `train_state`: .*'step': 2.* on rank 0; .*'step': 3.* on rank 1",
        ),
        ("other place", r"the ranks disagree on `directory`: .* on rank 0; .*elsewhere.* on rank 1"),
    ],
)
def test_ranks_that_do_not_mean_the_same_find_out_before_anything_is_written(
    gloo: Gloo, child: Path, tmp_path: Path, kind: str, text: str
) -> None:
    """E5."""
    results = gloo.run(save_again, child, config_of(tmp_path), 1, kind, world_size=2)
    for result in results:
        with pytest.raises(Exception, match=text):
            raise result
    assert steps_in(tmp_path) == [1]


def test_a_checkpoint_that_one_rank_cannot_read_is_read_by_none(
    gloo: Gloo, child: Path, tmp_path: Path
) -> None:
    gloo.run_ok(train_save_train, child, config_of(tmp_path), (1, 0), world_size=2)
    (tmp_path / "iter_0000001" / "rng" / "rank_00001.json").unlink()
    results = gloo.run(resume_and_train, child, config_of(tmp_path), 0, world_size=2)
    assert {result.type for result in results} == {"CollectiveError"}
    assert "rng/rank_00001.json: no such file" in results[0].text


# Where each rank is in the data ----------------------------------------------------------------------------


class Loader:
    def __init__(self, at: int = 0) -> None:
        self.at = at

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def save_loader(checkpoint: Path, config: Any, places: list[int]) -> None:
    rank = dist.get_rank()
    loader = Loader(places[rank]) if rank < len(places) else None
    PipelineTraining(checkpoint, config).train(1).save(train_data_iterator=loader)


def load_loader(checkpoint: Path, config: Any) -> int:
    loader = Loader()
    PipelineTraining(checkpoint, config).load(train_data_iterator=loader)
    return loader.at


@pytest.mark.parametrize("places", [[5, 5], [5]])
def test_ranks_of_one_pipeline_go_on_in_the_data_where_any_of_them_was(
    gloo: Gloo, child: Path, tmp_path: Path, places: list[int]
) -> None:
    gloo.run_ok(save_loader, child, config_of(tmp_path), places, world_size=2)
    assert os.listdir(tmp_path / "iter_0000001" / "dataloader") == ["train_dataloader_dprank000.json"]
    assert gloo.run_ok(load_loader, child, config_of(tmp_path), world_size=3) == [5] * 3


def test_ranks_with_data_of_their_own_go_on_with_as_many(gloo: Gloo, child: Path, tmp_path: Path) -> None:
    gloo.run_ok(save_loader, child, config_of(tmp_path), [5, 6], world_size=2)
    assert gloo.run_ok(load_loader, child, config_of(tmp_path), world_size=2) == [5, 6]
    results = gloo.run(load_loader, child, config_of(tmp_path), world_size=1)
    assert "ranks 0-1 of 2 were each at a place of their own in the data" in results[0].text


# On a disk of each rank ------------------------------------------------------------------------------------


def test_local_checkpoints_are_resumed_from_the_newest_that_all_ranks_have(
    gloo: Gloo, tied: Path, tmp_path: Path
) -> None:
    local = {"non_persistent_ckpt_type": "local", "non_persistent_local_ckpt_dir": tmp_path / "disk"}
    config = config_of(tmp_path / "run", non_persistent_recent_k=3, **local)
    kept = gloo.run_ok(save_locally, tied, config, world_size=2)
    newest = tmp_path / "disk" / "rank_00001" / "iter_0000003"
    newest.rename(newest.with_name("lost"))
    resumed = gloo.run_ok(load_locally, tied, config, world_size=2)
    for (loaded, found), expected in zip(resumed, kept, strict=True):
        assert loaded == (2, 2)
        assert equal(found, expected)
    for rank in (0, 1):
        os.rename(tmp_path / f"disk/rank_0000{rank}", tmp_path / f"disk/{rank}")
    for rank in (0, 1):
        os.rename(tmp_path / f"disk/{rank}", tmp_path / f"disk/rank_0000{1 - rank}")
    results = gloo.run(load_locally, tied, config, world_size=2)
    assert "a local checkpoint of rank 1 of 2, read on rank 0 of 2" in results[0].text


def save_locally(checkpoint: Path, config: Any) -> Any:
    training = PipelineTraining(checkpoint, config)
    manager = create_checkpoint_manager(config)
    kept = None
    for step in (1, 2, 3):
        training.train(1)
        manager.save(CheckpointSaveContext(*training.parts, step, non_persistent_ckpt=True))
        kept = training.everything() if step == 2 else kept
    return kept


def load_locally(checkpoint: Path, config: Any) -> Any:
    training = PipelineTraining(checkpoint, config)
    return training.load(), training.everything()
