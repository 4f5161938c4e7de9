"""Ranks load together: if one of them fails, all raise the same error, soon."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from support.gloo import Gloo, RankFailure
from support.tiny import tiny_checkpoint
from torch import distributed

from sharded_ckpt import load_and_shard_model
from sharded_ckpt.runtime import default_runtime

TIMEOUT = 8.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint(tmp_path), tmp_path / "checkpoint")


def _load(folder: str, own_folder_of: int | None = None, stay_away: int | None = None) -> float:
    rank = distributed.get_rank()
    begin = time.monotonic()
    runtime = default_runtime(device="cpu", timeout=TIMEOUT)
    if rank == stay_away:
        time.sleep(2 * TIMEOUT)
        return 0.0
    path = folder if rank != own_folder_of else f"{folder}-of-rank-{rank}"
    try:
        load_and_shard_model("auto", path, runtime=runtime)
    except Exception as error:
        error.args = (f"{error}", time.monotonic() - begin)
        raise
    return time.monotonic() - begin


def failures(results: list[object]) -> list[RankFailure]:
    assert all(isinstance(result, RankFailure) for result in results), results
    return results  # type: ignore[return-value]


def test_one_rank_without_the_checkpoint_fails_all_with_its_name_and_cause(folder: Path, gloo: Gloo) -> None:
    found = failures(gloo.run(_load, str(folder), 1, world_size=3))
    texts = {failure.text.splitlines()[0].rpartition("', ")[0] for failure in found}
    assert {failure.type for failure in found} == {"CollectiveError"}
    assert len(texts) == 1, "every rank raises the same error"
    (text,) = texts
    assert "rank 1" in text
    assert "CheckpointNotFoundError" in text
    assert f"{folder}-of-rank-1" in text


def test_one_rank_that_lacks_a_shard_fails_all(folder: Path, gloo: Gloo) -> None:
    shutil.copytree(folder, f"{folder}-of-rank-2")
    Path(f"{folder}-of-rank-2", "model-00003-of-00003.safetensors").unlink()
    found = failures(gloo.run(_load, str(folder), 2, world_size=3))
    assert all("model-00003-of-00003.safetensors" in failure.text for failure in found)
    assert all("rank 2" in failure.text for failure in found)


def test_several_failing_ranks_are_all_named(tmp_path: Path, gloo: Gloo) -> None:
    found = failures(gloo.run(_load, str(tmp_path / "absent"), world_size=2))
    assert all("failed on all 2 ranks: CheckpointNotFoundError" in failure.text for failure in found)


def test_a_rank_that_never_comes_is_named_within_the_timeout(folder: Path, gloo: Gloo) -> None:
    begin = time.monotonic()
    results = gloo.run(_load, str(folder), None, 1, world_size=2, timeout=60.0)
    assert isinstance(results[0], RankFailure)
    assert results[0].type == "CollectiveError"
    assert "1" in results[0].text
    waited = float(results[0].text.rpartition(", ")[2].rstrip(")"))
    assert waited < TIMEOUT + 3
    assert time.monotonic() - begin < 60


def _load_different_models(first: str, second: str) -> None:
    load_and_shard_model("auto", first if distributed.get_rank() == 0 else second)


def test_ranks_that_would_leave_blocks_unowned_are_found_out(tmp_path: Path, gloo: Gloo) -> None:
    short, long = tiny_checkpoint(tmp_path, layers=2), tiny_checkpoint(tmp_path, layers=6)
    found = failures(gloo.run(_load_different_models, str(short), str(long), world_size=2))
    assert {failure.type for failure in found} == {"ConfigError"}
    assert all("rank 1 loads another model than rank 0" in failure.text for failure in found)
