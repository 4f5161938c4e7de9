"""Saves in the background: what was there at the call is saved, whole, on all ranks or on none."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.async_saves import (
    BrokenStorage,
    GatedStorage,
    die_while_saving,
    fail_on_the_last_rank,
    load_first,
    loaded,
    made,
    request_for,
    save,
    save_by_processes,
    spoil,
    values_of,
    wait_for_the_slowest,
)
from support.gloo import Gloo, RankFailure

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt.training.checkpointing import (
    AsyncCallsQueue,
    AsyncRequest,
    GlobalState,
    get_save_and_finalize_callbacks,
    is_empty_async_queue,
    maybe_finalize_async_save,
    schedule_async_save,
)

ASYNC = SimpleNamespace(async_save=True)


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("worker", ["thread", "process"])
def test_what_changes_after_the_call_is_not_saved(tmp_path: Path, worker: str) -> None:
    training, storage = made(), GatedStorage()
    if worker == "process":  # it opens files by itself
        storage.go_on.set()
    with AsyncCallsQueue(worker=worker) as queue:
        for number in range(2):
            expected = values_of(training)
            save(tmp_path / f"{number}", training, queue, storage=storage)
            spoil(training)
            storage.go_on.set()
            assert queue.maybe_finalize_async_calls(blocking=True) == [number]
            assert same(loaded(tmp_path / f"{number}"), expected)
            training = made()


def test_a_second_save_allocates_nothing_and_has_the_values_of_now(tmp_path: Path) -> None:
    training = made()
    with AsyncCallsQueue() as queue:
        places = []
        for number in range(3):
            request = request_for(tmp_path / f"{number}", training, queue)
            staged = request.async_fn.__self__
            places.append(
                {name: tensor.data_ptr() for name, tensor in {**staged.model, **staged.optim}.items()}
            )
            queue.schedule_async_request(request)
            spoil(training)
        assert places[0] == places[1] == places[2]
        assert queue._buffers.allocations == 1
        queue.close()
    assert not same(loaded(tmp_path / "0"), values_of(training))
    assert same(loaded(tmp_path / "1"), values_of(training))


def test_nothing_is_there_before_the_save_is_complete(tmp_path: Path) -> None:
    training, storage, order = made(), GatedStorage(), []
    with AsyncCallsQueue() as queue:
        state = GlobalState(ASYNC, async_calls_queue=queue)
        finalizers = [lambda: order.append((tmp_path / "new").exists()), lambda: order.append("second")]
        save(tmp_path / "new", training, queue, storage=storage, finalizers=finalizers)
        assert storage.reached.wait(30)
        maybe_finalize_async_save(state, ASYNC)
        assert not is_empty_async_queue(state)
        assert (order, (tmp_path / "new").exists()) == ([], False)
        assert queue.in_flight is not None
        assert queue.in_flight.directory == str(tmp_path / "new")
        storage.go_on.set()
        maybe_finalize_async_save(state, ASYNC, blocking=True)
        assert is_empty_async_queue(state)
        assert order == [True, "second"]


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    training, storage = made(), GatedStorage()
    with AsyncCallsQueue() as queue:
        save(tmp_path / "first", training, queue, storage=storage)
        assert storage.reached.wait(30)
        storage.go_on.set()
        save(tmp_path / "second", training, queue)
        assert (tmp_path / "first" / "training_state.json").exists()
        assert queue.get_num_unfinalized_calls() == 1


def meet_the_error(queue: AsyncCallsQueue, moment: str, directory: Path) -> None:
    if moment == "save":
        save(directory, made(), queue)
    elif moment == "close":
        queue.close()
    else:
        while not queue.maybe_finalize_async_calls(blocking=moment == "wait"):
            pass


@pytest.mark.parametrize("moment", ["save", "wait", "poll", "close"])
def test_an_error_is_raised_once_and_nothing_was_published(tmp_path: Path, moment: str) -> None:
    training, order = made(), []
    queue = AsyncCallsQueue()
    save(
        tmp_path / "new", training, queue, storage=BrokenStorage(), finalizers=[lambda: order.append("done")]
    )
    with pytest.raises(OSError, match=r"No space left on device while writing to .*new; nothing was"):
        meet_the_error(queue, moment, tmp_path / "next")
    assert order == []
    assert os.listdir(tmp_path) == []
    queue.maybe_finalize_async_calls(blocking=True)
    if moment != "close":
        save(tmp_path / "next", training, queue)
    queue.close()
    assert moment == "close" or same(loaded(tmp_path / "next"), values_of(training))


def test_in_the_foreground_the_same_is_done_at_once(tmp_path: Path) -> None:
    training, order = made(), []
    request = request_for(tmp_path / "new", training)
    request.add_finalize_fn(lambda: order.append((tmp_path / "new").exists()))
    request.execute_sync()
    assert order == [True]
    assert same(loaded(tmp_path / "new"), values_of(training))
    with pytest.raises(OSError, match="No space left"):
        request_for(
            tmp_path / "no", training, storage=BrokenStorage(), finalizers=[order.clear]
        ).execute_sync()
    assert order == [True]


@pytest.mark.parametrize(
    ("error", "text"), [(ZeroDivisionError("by zero"), "by zero"), (KeyboardInterrupt(), "KeyboardInterrupt")]
)
def test_leaving_by_an_error_publishes_nothing_and_leaves_no_litter(
    tmp_path: Path, caplog, error: BaseException, text: str
) -> None:
    def train() -> None:
        with AsyncCallsQueue() as queue:
            save(tmp_path / "new", made(), queue)
            raise error

    with pytest.raises(type(error)):
        train()
    assert os.listdir(tmp_path) == []
    assert f"new is not published: {text}" in caplog.text


def test_a_queue_that_is_dropped_says_what_was_not_published(tmp_path: Path, caplog) -> None:
    queue = AsyncCallsQueue()
    save(tmp_path / "new", made(), queue)
    queue._thread.shutdown()
    del queue
    gc.collect()
    assert f"{tmp_path}/new was written, but never published: close the queue of saves" in caplog.text


def test_a_request_without_a_queue_is_not_lost_silently() -> None:
    state = GlobalState(ASYNC)
    with pytest.raises(ConfigError, match="there is no queue that could save in the background"):
        schedule_async_save(state, AsyncRequest(None))
    assert is_empty_async_queue(state)
    maybe_finalize_async_save(state, ASYNC, blocking=True)


def test_a_queue_is_left_alone_unless_saves_are_asynchronous() -> None:
    order = []
    with AsyncCallsQueue() as queue:
        state = GlobalState(ASYNC, async_calls_queue=queue)
        schedule_async_save(state, AsyncRequest(None, (), [lambda: order.append("done")]))
        maybe_finalize_async_save(state, SimpleNamespace(async_save=False), blocking=True, terminate=True)
        assert order == []
        maybe_finalize_async_save(state, ASYNC, terminate=True)
        assert order == ["done"]
        with pytest.raises(RuntimeError, match="this queue of saves is closed: make another one"):
            queue.schedule_async_request(AsyncRequest(None))


def test_what_was_scheduled_cannot_be_added_to() -> None:
    request = AsyncRequest(lambda *args: list(args), (1,), preload_fn=lambda: (2,)).freeze()
    assert request.write() == [2]
    with pytest.raises(RuntimeError, match="was scheduled, so nothing can be added"):
        request.add_finalize_fn(print)


def test_an_unknown_worker_is_refused() -> None:
    with pytest.raises(ConfigError, match="the worker is 'fork'; it must be 'thread' or 'process'"):
        AsyncCallsQueue(worker="fork")


# Ranks ------------------------------------------------------------------------------------------------------


def test_a_failing_rank_makes_all_ranks_raise_the_same_and_publishes_nothing(gloo: Gloo, tmp_path) -> None:
    for said, *wrong in gloo.run_ok(fail_on_the_last_rank, str(tmp_path), world_size=3):
        assert re.fullmatch(
            r"writing to .*/bad failed on rank 2 of 3: OSError: .*No space left on device.*nothing was "
            r"published.*; ranks 0-1 were well",
            said,
        ), said
        assert wrong == []
    assert os.listdir(tmp_path) == ["good"]


def test_no_rank_publishes_before_the_slowest_has_written(gloo: Gloo, tmp_path: Path) -> None:
    assert gloo.run_ok(wait_for_the_slowest, str(tmp_path)) == [[[([], False)] * 3, [0], True]] * 2


@pytest.mark.slow
def test_ranks_that_survive_a_dying_one_raise_and_the_save_before_stays(gloo: Gloo, tmp_path: Path) -> None:
    *well, dead = gloo.run(die_while_saving, str(tmp_path), world_size=3, lost=[2])
    assert isinstance(dead, RankFailure)
    said = well[0][0]
    assert "asking whether a save is written failed on rank 2 of 3: no sign of life for 6 s" in said
    assert well[1] == well[0] == [said, 0, ["first"]]
    gloo.run_ok(load_first, str(tmp_path), world_size=3)


@pytest.mark.slow
def test_every_rank_may_have_a_process_that_writes(gloo: Gloo, tmp_path: Path) -> None:
    assert gloo.run_ok(save_by_processes, str(tmp_path), timeout=120) == [[], []]


# The process that writes ------------------------------------------------------------------------------------


def test_errors_and_the_death_of_the_writing_process_are_told(tmp_path: Path, capfd) -> None:
    training = made()
    with AsyncCallsQueue(worker="process") as queue:
        save(tmp_path / "first", training, queue)
        queue.maybe_finalize_async_calls(blocking=True)
        process = queue._process._process

        request = request_for(tmp_path / "second", training, queue)
        request.async_fn_args[0].path.rmdir()
        queue.schedule_async_request(request)
        with pytest.raises(FileNotFoundError, match=r"No such file or directory while writing to .*second"):
            queue.maybe_finalize_async_calls(blocking=True)

        os.kill(process.pid, signal.SIGKILL)
        save(tmp_path / "third", training, queue)
        with pytest.raises(CheckpointError, match="the process that writes has ended with exit code -9"):
            queue.maybe_finalize_async_calls(blocking=True)

        save(tmp_path / "fourth", training, queue)
        queue.maybe_finalize_async_calls(blocking=True)
        assert same(loaded(tmp_path / "fourth"), values_of(training))
        process = queue._process._process
    assert process.returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["first", "fourth"]


SCRIPT = """
import sys, torch
from sharded_ckpt.training import AsyncCallsQueue
from support.async_saves import made, save
print("imported once")
with AsyncCallsQueue(worker="process") as queue:
    save(sys.argv[1], made(), queue)
"""


@pytest.mark.slow
def test_a_script_without_a_guard_may_use_the_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-W", "error", tmp_path / "script.py", tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "imported once\n"), done.stderr
    assert (tmp_path / "out" / "training_state.json").exists()


# torch's own saves ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_save_that_dcp_has_begun_is_waited_for(tmp_path: Path) -> None:
    order = []
    writer = dcp.FileSystemWriter(tmp_path / "dcp")
    weight = torch.arange(4.0)
    returned = Future()
    request = get_save_and_finalize_callbacks(writer, returned)
    request.add_finalize_fn(lambda: order.append("finalized"))
    with AsyncCallsQueue() as queue:
        queue.schedule_async_request(request)
        assert queue.maybe_finalize_async_calls() == []
        dcp.save({"weight": weight}, storage_writer=writer, no_dist=True)
        returned.set_result(None)
        queue.maybe_finalize_async_calls(blocking=True)
        assert order == ["finalized"]

        failing = Future()
        failing.set_exception(OSError("disk gone"))
        response = SimpleNamespace(staging_completion=Future(), upload_completion=failing)
        queue.schedule_async_request(get_save_and_finalize_callbacks(None, response))
        with pytest.raises(OSError, match="disk gone"):
            queue.maybe_finalize_async_calls(blocking=True)
    with pytest.raises(
        ConfigError, match=r"what torch\.distributed.checkpoint.async_save returns, found a int"
    ):
        get_save_and_finalize_callbacks(None, 3)
