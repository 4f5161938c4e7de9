"""Ranks on one machine: processes that all answer, or end with a reason, and never outlive their parent."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support import rank_work

from patchers.errors import CollectiveError
from sharded_ckpt.local_ranks import on_ranks


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids_in(folder: Path) -> list[int]:
    return [int(file.read_text() or 0) for file in folder.iterdir()]


def test_answers_come_in_rank_order_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    answers = on_ranks(rank_work.tell, ["a", 1], world_size=3, timeout=60)
    assert answers == [(rank, 3, ("a", 1)) for rank in range(3)]
    assert capfd.readouterr() == ("", "")


def test_no_process_is_left_after_an_answer() -> None:
    pids = on_ranks(rank_work.process_id, world_size=2, timeout=60)
    assert len(set(pids)) == 2
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("raise", "ValueError: the disk is gone"),
        ("kill", "the process was killed by SIGKILL; it had written: rank 1 is about to fail"),
        ("exit", "the process ended with exit code 3; it had written: rank 1 is about to fail"),
    ],
)
def test_one_rank_fails_and_the_others_are_ended_at_once(tmp_path: Path, how: str, why: str) -> None:
    began = time.monotonic()
    with pytest.raises(CollectiveError) as caught:
        on_ranks(rank_work.fail_on_rank_1, [how, tmp_path], world_size=2, timeout=120)
    assert str(caught.value) == f"rank 1 of 2 failed: {why}"
    assert caught.value.failures == {1: why}
    assert time.monotonic() - began < 30
    assert len(pids_in(tmp_path)) == 2
    assert not any(is_alive(pid) for pid in pids_in(tmp_path))


def test_an_answer_that_cannot_be_sent_is_a_failure_of_its_rank(tmp_path: Path) -> None:
    with pytest.raises(CollectiveError, match=r"^rank 1 of 2 failed: \w+: .*pickle.*lambda"):
        on_ranks(rank_work.fail_on_rank_1, ["answer", tmp_path], world_size=2, timeout=120)


def test_silence_ends_with_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(CollectiveError) as caught:
        on_ranks(rank_work.fail_on_rank_1, ["hang", tmp_path], world_size=2, timeout=3)
    assert str(caught.value) == "ranks 0-1 of 2 failed: no answer within 3 seconds"
    assert not any(is_alive(pid) for pid in pids_in(tmp_path))


def test_a_verdict_of_the_ranks_is_said_once_and_as_it_is() -> None:
    with pytest.raises(CollectiveError) as caught:
        on_ranks(rank_work.fail_together, world_size=2, timeout=60)
    assert str(caught.value) == "loading x failed on rank 0 of 2: OSError: disk gone; rank 1 was well"


def test_ranks_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = "import sys; from support.rank_work import be_orphaned; be_orphaned(sys.argv[1])"
    tests = str(Path(__file__).parent)
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=tests)
    try:
        limit = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2 or 0 in pids_in(tmp_path):
            assert time.monotonic() < limit
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.wait()
    limit = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids_in(tmp_path)):
        assert time.monotonic() < limit, "the ranks outlive their parent"
        time.sleep(0.02)
