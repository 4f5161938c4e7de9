"""Old checkpoints go, but never one that counts, is pinned, is being read, or belongs to another future."""

from __future__ import annotations

import errno
import fcntl
import os
import threading

import pytest
from support.iteration_dirs import run_directory, steps_in, track
from support.storages import FaultyStorage, WatchedStorage

from patchers.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from sharded_ckpt.training.checkpointing.retention import (
    being_read,
    cleanup_old_non_persistent_checkpoint,
    expired,
    pin_checkpoint,
    remove_old_checkpoints,
    unpin_checkpoint,
)


def test_the_latest_stay_by_number_not_by_text_or_time(tmp_path):
    steps = [1, 2, 10, 9999999, 10000000]
    run_directory(tmp_path, steps)
    for step, directory in zip(reversed(steps), sorted(tmp_path.iterdir()), strict=True):
        os.utime(directory, (step, step))  # a clock that goes backwards
    assert remove_old_checkpoints(tmp_path, 2) == [1, 2, 10]
    assert steps_in(tmp_path) == [9999999, 10000000]


def test_keeping_all_or_more_than_there_are_removes_nothing(tmp_path):
    run_directory(tmp_path, [10, 20])
    assert remove_old_checkpoints(tmp_path, -1) == []
    assert remove_old_checkpoints(tmp_path, 5) == []
    assert remove_old_checkpoints(tmp_path / "nowhere", 1) == []


def test_what_the_tracker_names_stays_whatever_the_number(tmp_path):
    run_directory(tmp_path, [10, 20, 30], 10)
    cleanup_old_non_persistent_checkpoint(str(tmp_path), 0)
    assert steps_in(tmp_path) == [10]
    run_directory(tmp_path / "other", [10, 20])
    cleanup_old_non_persistent_checkpoint(str(tmp_path / "other"), 0)
    assert steps_in(tmp_path / "other") == []


def test_a_future_that_was_given_up_neither_counts_nor_goes(tmp_path):
    run_directory(tmp_path, [5, 10, 20, 100])
    assert expired([5, 10, 20, 100], 2, newest=20) == [5]
    cleanup_old_non_persistent_checkpoint(str(tmp_path), 2, max_iteration=20)
    assert steps_in(tmp_path) == [10, 20, 100]


def test_what_is_not_whole_or_not_ours_neither_counts_nor_goes(tmp_path):
    run_directory(tmp_path, [10, 20])
    others = ["iter_0000030", "iter_0000005.bak", "iter_foo", "logs", ".iter_0000040.saving", "release"]
    for name in others:
        (tmp_path / name).mkdir()
    assert remove_old_checkpoints(tmp_path, 1) == [10]
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "iter_0000020"])


def test_of_a_checkpoint_that_was_moved_elsewhere_and_linked_the_link_goes_alone(tmp_path):
    run, archive = run_directory(tmp_path / "run", [10, 20, 30]), tmp_path / "archive"
    for name in ("iter_0000010", "iter_0000020"):
        archive.mkdir(exist_ok=True)
        (run / name).rename(archive / name)
    (run / "iter_0000010").symlink_to(archive / "iter_0000010")
    (run / ".iter_0000020.removing").symlink_to(archive / "iter_0000020")  # of a removal that was cut off
    assert remove_old_checkpoints(run, 1) == [10]
    assert os.listdir(run) == ["iter_0000030"]
    assert steps_in(archive) == [10, 20]


def test_a_pinned_checkpoint_stays_until_it_is_let_go(tmp_path):
    run_directory(tmp_path, [10, 20, 30])
    pin_checkpoint(tmp_path / "iter_0000010")
    pin_checkpoint(tmp_path / "iter_0000010")
    assert remove_old_checkpoints(tmp_path, 1) == [20]
    unpin_checkpoint(tmp_path / "iter_0000010")
    assert remove_old_checkpoints(tmp_path, 1) == [10]
    with pytest.raises(CheckpointNotFoundError, match="expected the directory of one step"):
        pin_checkpoint(tmp_path)


def test_a_checkpoint_that_is_being_read_stays_until_nobody_reads_it(tmp_path):
    run_directory(tmp_path, [10, 20])
    with being_read(tmp_path / "iter_0000010"), being_read(tmp_path / "iter_0000010"):
        assert remove_old_checkpoints(tmp_path, 1) == []
    assert remove_old_checkpoints(tmp_path, 1) == [10]
    with (
        pytest.raises(CheckpointNotFoundError, match="no such directory"),
        being_read(tmp_path / "iter_0000010"),
    ):
        pass


def test_what_is_being_removed_is_not_read(tmp_path):
    run_directory(tmp_path, [10])
    fd = os.open(tmp_path / "iter_0000010", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with (
            pytest.raises(CheckpointNotFoundError, match="being removed"),
            being_read(tmp_path / "iter_0000010"),
        ):
            pass
    finally:
        os.close(fd)


def test_a_broken_tracker_lets_nothing_go(tmp_path):
    run_directory(tmp_path, [10, 20, 30], "?")
    with pytest.raises(CheckpointError, match="expected a step"):
        remove_old_checkpoints(tmp_path, 1)
    assert steps_in(tmp_path) == [10, 20, 30]


def test_what_resists_is_said_and_tried_again_at_every_operation(tmp_path, caplog):
    healthy = WatchedStorage(durable=False)
    run_directory(tmp_path / "healthy", [10, 20], 20)
    remove_old_checkpoints(tmp_path / "healthy", 1, storage=healthy)
    assert len(healthy.log) > 3
    for number in range(1, len(healthy.log) + 1):
        run = run_directory(tmp_path / str(number), [10, 20], 20)
        storage = FaultyStorage(number, OSError(errno.EIO, "Input/output error"), durable=False)
        caplog.clear()
        assert remove_old_checkpoints(run, 1, storage=storage) == []
        assert storage.failed
        assert "iter_0000010 is old, but cannot be removed, the next save will try again" in caplog.text
        assert 20 in steps_in(run)
        remove_old_checkpoints(run, 1)
        assert [path.name for path in run.iterdir() if path.is_dir()] == ["iter_0000020"]


def test_in_a_thread_a_failure_is_said_and_the_thread_ends(tmp_path, caplog):
    run_directory(tmp_path, [10, 20], 20)
    before = set(threading.enumerate())
    cleanup_old_non_persistent_checkpoint(str(tmp_path), do_async=True)
    track(tmp_path, "broken")
    cleanup_old_non_persistent_checkpoint(str(tmp_path), do_async=True)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert steps_in(tmp_path) in ([20], [10, 20])  # the first may have met the broken tracker, too
    assert f"old checkpoints in {tmp_path} are not removed" in caplog.text


def test_a_negative_number_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="leave_ckpt_num is -1; it must be 0 or more"):
        cleanup_old_non_persistent_checkpoint(str(tmp_path), -1)
