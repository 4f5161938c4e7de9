from __future__ import annotations

import gc
import os
import signal
import threading
import time
from typing import Any

import pytest
from support.gloo import Gloo, RankFailure

from patchers.errors import CheckpointError, CollectiveError, MissingKeysError
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.collective.control_group import chunks, control_group
from sharded_ckpt.collective.verdict import ConnectionCutError, Verdict, entry, judge

# What ranks run -------------------------------------------------------------------------------------------


def gather_rank(values: list[Any]) -> list[Any]:
    control = control_group()
    return control.gather(values[control.rank], "telling")


def vote_with(errors: dict[int, Exception], rounds: int = 1) -> list[str]:
    """Vote in `together`, `rounds` times over; return what each round raised."""
    control = control_group(timeout=20)
    texts = []
    for _ in range(rounds):
        try:
            with together(control, "reading the shards of /models/x"):
                if control.rank in errors:
                    raise errors[control.rank]
        except CollectiveError as error:
            texts.append(str(error) if error.__cause__ is errors.get(control.rank) else "another cause")
    control.vote(None, "going on")  # an ordinary failure leaves the ranks able to go on
    return texts


def raise_missing_keys(rank: int) -> None:
    control = control_group(timeout=20)
    with together(control, "loading"):
        if control.rank == rank:
            raise MissingKeysError("no lm_head.weight")


def vote_inside_vote() -> None:
    control = control_group(timeout=20)
    with together(control, "the outer work"), together(control, "the inner work"):
        if control.rank == 1:
            raise OSError("disk gone")


def one_does_not_come(rank: int, how: str, timeout: float) -> tuple[str, dict[int, str], float]:
    control = control_group(timeout=timeout)
    control.vote(None, "starting")
    if control.rank == rank:
        time.sleep(0.3)  # all have heard the verdict of the start, also from a store that dies now
        if how == "late":
            time.sleep(60)
        if how == "returns":
            return "left", {}, 0.0
        os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
    began = time.monotonic()
    try:
        control.vote(None, "reading the shards of /models/x")
    except CollectiveError as error:
        return str(error), error.failures, time.monotonic() - began
    raise AssertionError("nobody noticed")


def dies_inside_the_vote(rank: int) -> list[str]:
    """One rank votes and is killed while it waits: that vote counts, the next one misses it."""
    control = control_group(timeout=2)
    control.vote(None, "starting")
    if control.rank == rank:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    else:
        time.sleep(0.8)
    told = []
    for doing in ("reading", "saving"):
        try:
            control.vote(None, doing)
            told.append("well")
        except CollectiveError as error:
            told.append(str(error))
    return told


def main_rank_comes_last_and_leaves() -> None:
    control = control_group(timeout=20)
    if control.rank == 0:
        time.sleep(2)  # the others look ever more seldom
    control.vote(None, "loading")


def never_enters(rank: int) -> str:
    if control_rank() == rank:
        time.sleep(60)
    try:
        control_group(timeout=2).vote(None, "loading")
    except CollectiveError as error:
        return str(error)
    raise AssertionError("nobody noticed")


def control_rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def comes_too_late() -> list[str]:
    control = control_group(timeout=0.5)
    texts = []
    for _ in range(2):
        if control.rank == 1 and not texts:
            time.sleep(1.5)
        try:
            control.vote(None, "loading")
        except CollectiveError as error:
            texts.append(str(error))
    return texts


def out_of_step() -> None:
    control = control_group(timeout=20)
    control.vote(None, "reading /a/1" if control.rank == 0 else "saving /a/1")


def in_step_with_other_paths() -> None:
    control = control_group(timeout=20)
    control.vote(None, f"reading shard {control.rank} of /disk{control.rank}/model")


def leave_no_thread() -> int:
    import torch.distributed as dist

    control = control_group(timeout=20)
    assert control_group()._links is control._links
    control.vote(None, "meeting")
    assert any(thread.name == "sharded_ckpt store" for thread in threading.enumerate())
    dist.barrier()
    dist.destroy_process_group()
    del control
    gc.collect()
    return sum(thread.name == "sharded_ckpt store" for thread in threading.enumerate())


def count_keys(rounds: int) -> int:
    import torch.distributed as dist

    control = control_group(timeout=20)
    for _ in range(rounds):
        control.gather("x" * 1_100_000, "telling much")
    dist.barrier()
    return dist.group.WORLD.get_group_store().num_keys()


def vote_in_pairs() -> list[Any]:
    import torch.distributed as dist

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    control = control_group(pairs[dist.get_rank() // 2], timeout=20)
    control.connect()
    return control.gather(dist.get_rank(), "telling the pair")


def connect_unlike_ranks() -> list[int]:
    """Connect ranks that are in three groups, two, one and two, with all and in a pair."""
    import torch.distributed as dist

    groups = [dist.new_group(ranks) for ranks in ([0, 1], [0, 3])]
    control_group(timeout=20).connect()
    if dist.get_rank() < 2:
        control_group(groups[0], timeout=20).connect()
    return control_group(timeout=20).gather(dist.get_rank(), "telling all")


def exchange(chunk_bytes: int) -> list[int]:
    """Rank 0 sends every kind of tensor to all; each checks every bit. Returns the bytes of each chunk."""
    import torch

    control = control_group(timeout=20)
    control.connect()
    tensors = all_kinds_of_tensors()
    sent: list[int] = []
    if control.rank == 0:
        others = range(1, control.world_size)
        control.send_tensors({to: iter(tensors) for to in others}, chunk_bytes=chunk_bytes, sent=sent.append)
        return sent
    for tensor in tensors:
        into = torch.empty(tensor.shape, dtype=tensor.dtype)
        control.receive_tensor(into, chunk_bytes=chunk_bytes)
        wanted = tensor.resolve_conj().contiguous().reshape(-1)
        assert torch.equal(into.reshape(-1).view(torch.uint8), wanted.view(torch.uint8)), tensor.dtype
    return sent


def all_kinds_of_tensors() -> list[Any]:
    import torch

    base = torch.arange(7 * 5 * 3).reshape(7, 5, 3)
    dtypes = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]
    kinds = [base.to(dtype) for dtype in [*dtypes, torch.complex64, torch.float64]]
    odd = [base.mT, base[::2, :, 1], torch.tensor(3.5), torch.empty(0, 4), torch.arange(9.0).expand(4, 9)]
    return kinds + odd + [torch.tensor(float("nan")), torch.complex(base.double(), base.double()).conj()]


def receive_with_cast() -> None:
    import torch

    control = control_group(timeout=20)
    control.connect()
    value = torch.arange(10.0).reshape(2, 5)
    if control.rank == 0:
        control.send_tensors({1: [value.bfloat16()]}, chunk_bytes=8)
    else:
        into = torch.zeros(5, 2).T  # neither the dtype that is sent nor contiguous
        control.receive_tensor(into, dtype=torch.bfloat16, chunk_bytes=8)
        assert torch.equal(into, value)


def receiver_dies(rank: int, timeout: float) -> list[str]:
    import torch

    control = control_group(timeout=timeout)
    control.connect()
    try:
        with together(control, "sending the tensors"):
            if control.rank == 0:
                control.send_tensors({to: [torch.zeros(2**22)] for to in (1, 2)}, chunk_bytes=2**16)
            else:
                if control.rank == rank:
                    os.kill(os.getpid(), signal.SIGKILL)
                control.receive_tensor(torch.zeros(2**22), chunk_bytes=2**16)
    except CollectiveError as error:
        return [str(error)]
    return ["well"]


def receiver_raises() -> list[str]:
    import torch

    control = control_group(timeout=2)
    control.connect()
    texts = []
    for _ in range(2):
        try:
            with together(control, "sending the tensors"):
                if control.rank == 0:
                    control.send_tensors({to: [torch.zeros(8)] for to in (1, 2)})
                elif control.rank == 1 and not texts:
                    raise MemoryError("no room")
                else:
                    control.receive_tensor(torch.zeros(8))
        except CollectiveError as error:
            texts.append(str(error))
    return texts


# Votes and gathers ----------------------------------------------------------------------------------------


def test_control_group_is_a_coordinator(gloo: Gloo) -> None:
    assert gloo.run_ok(is_coordinator) == [True, True]


def is_coordinator() -> bool:
    return isinstance(control_group(), Coordinator)


@pytest.mark.parametrize("store", ["file", "tcp"])
def test_every_rank_gathers_the_values_of_all(gloo: Gloo, store: str) -> None:
    values = [{"keys": ["a", "b"], "bytes": 2**60}, None, [1.5, True, "ü"], "x" * 2_500_000]
    assert gloo.run_ok(gather_rank, values, world_size=4, store=store) == [values] * 4


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ({"a": {1: 2}}, "TypeError: value['a'] has the key 1; only str keys can be gathered"),
        ([{1, 2}], "TypeError: value[0] is a set; only plain JSON data can be gathered"),
    ],
)
def test_what_json_would_change_is_refused_on_all_ranks(gloo: Gloo, value: Any, cause: str) -> None:
    text = f"telling failed on rank 1 of 2: {cause}; rank 0 was well"
    assert [failure.text for failure in gloo.run(gather_rank, [None, value])] == [text, text]


@pytest.mark.parametrize("store", ["file", "tcp"])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_failure_on_any_rank_is_raised_by_all_in_the_same_words(gloo: Gloo, rank: int, store: str) -> None:
    well = {0: "1-3", 1: "0,2-3", 3: "0-2"}[rank]
    text = (
        f"reading the shards of /models/x failed on rank {rank} of 4: "
        f"CheckpointError: model-1.safetensors is cut; ranks {well} were well"
    )
    errors = {rank: CheckpointError("model-1.safetensors is cut.")}
    assert gloo.run_ok(vote_with, errors, 3, world_size=4, store=store) == [[text] * 3] * 4


def test_several_failures_are_told_apart_and_equal_ones_once(gloo: Gloo) -> None:
    errors = {0: OSError("gone"), 1: OSError("gone"), 2: ValueError("odd")}
    text = (
        "reading the shards of /models/x failed on ranks 0-2 of 4: "
        "ranks 0-1: OSError: gone; rank 2: ValueError: odd; rank 3 was well"
    )
    assert gloo.run_ok(vote_with, errors, world_size=4) == [[text]] * 4
    errors = dict.fromkeys(range(2), OSError("gone"))
    text = "reading the shards of /models/x failed on all 2 ranks: OSError: gone"
    assert gloo.run_ok(vote_with, errors) == [[text]] * 2


def test_the_failed_rank_keeps_its_own_error_as_cause(gloo: Gloo) -> None:
    well, failed = gloo.run(raise_missing_keys, 1)
    assert (well.type, failed.type) == ("CollectiveError", "CollectiveError")
    assert (well.cause, failed.cause) == (None, "MissingKeysError: no lm_head.weight")
    assert well.error.failures == failed.error.failures == {1: "MissingKeysError: no lm_head.weight"}


def test_the_first_verdict_stays_through_an_outer_vote(gloo: Gloo) -> None:
    text = "the inner work failed on rank 1 of 2: OSError: disk gone; rank 0 was well"
    assert [failure.text for failure in gloo.run(vote_inside_vote)] == [text, text]


def test_ranks_at_different_work_are_told_before_they_take_each_others_values(gloo: Gloo) -> None:
    text = "the ranks are out of step: rank 0 at 'reading /a/1'; rank 1 at 'saving /a/1'. All ranks must make"
    for failure in gloo.run(out_of_step):
        assert failure.text.startswith(text)
    gloo.run_ok(in_step_with_other_paths)


def test_a_group_of_some_ranks_agrees_by_itself(gloo: Gloo) -> None:
    assert gloo.run_ok(vote_in_pairs, world_size=4) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_ranks_that_are_in_different_numbers_of_groups_connect(gloo: Gloo) -> None:
    assert gloo.run_ok(connect_unlike_ranks, world_size=4) == [[0, 1, 2, 3]] * 4


def test_store_and_threads_do_not_grow(gloo: Gloo) -> None:
    for store in ("file", "tcp"):
        few, many = gloo.run_ok(count_keys, 3, store=store), gloo.run_ok(count_keys, 5, store=store)
        assert few == many
    assert gloo.run_ok(leave_no_thread) == [0, 0]


# Ranks that do not answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "how", "store", "why"),
    [
        (2, "dies", "file", "no sign of life for 1.5 s (dead or frozen)"),
        (0, "dies", "file", "no sign of life for 1.5 s (dead or frozen)"),
        (1, "freezes", "tcp", "no sign of life for 1.5 s (dead or frozen)"),
        (1, "late", "tcp", "it did not get there within 2 s (do all ranks make this call?)"),
    ],
)
def test_a_rank_that_does_not_answer_is_named_in_time(
    gloo: Gloo, rank: int, how: str, store: str, why: str
) -> None:
    results = gloo.run(one_does_not_come, rank, how, 2.0, world_size=3, store=store, lost=[rank])
    well = {0: "1-2", 1: "0,2", 2: "0-1"}[rank]
    text = f"reading the shards of /models/x failed on rank {rank} of 3: {why}; ranks {well} were well"
    assert isinstance(results.pop(rank), RankFailure)
    for told, failures, seconds in results:
        assert told == text
        assert failures == {rank: why}
        assert seconds < 4


def test_a_rank_that_dies_inside_a_vote_is_named_by_the_next(gloo: Gloo) -> None:
    first, _, last = gloo.run(dies_inside_the_vote, 1, world_size=3, lost=[1])
    assert first == last
    assert first[0] == "well"
    assert first[1].startswith("saving failed on rank 1 of 3: no sign of life for 1.5 s (dead or frozen); ")


def test_a_rank_that_has_left_is_seen_at_once(gloo: Gloo) -> None:
    text = (
        "reading the shards of /models/x failed on rank 1 of 2: "
        "its process has ended; see what it printed; rank 0 was well"
    )
    (told, _, seconds), _ = gloo.run(one_does_not_come, 1, "returns", 16.0)
    assert told == text
    assert seconds < 4


@pytest.mark.parametrize(
    ("how", "lost"), [("freezes", "does not answer for 1.5 s"), ("dies", "cannot be reached")]
)
def test_a_lost_store_is_told_in_time(gloo: Gloo, how: str, lost: str) -> None:
    _, *results = gloo.run(one_does_not_come, 0, how, 2.0, world_size=3, store="tcp", lost=[0])
    for told, failures, seconds in results:
        start = "reading the shards of /models/x failed: the store through which the ranks agree " + lost
        assert told.startswith(start)
        assert list(failures) == [0]
        assert seconds < 4


def test_the_host_of_the_store_leaves_only_when_all_have_heard(gloo: Gloo) -> None:
    gloo.run_ok(main_rank_comes_last_and_leaves, world_size=4, store="tcp")


def test_a_rank_that_never_enters_is_named(gloo: Gloo) -> None:
    text = (
        "loading failed on rank 1 of 2: "
        "it did not get there within 2 s (do all ranks make this call?); rank 0 was well"
    )
    assert gloo.run(never_enters, 1, lost=[1])[0] == text


def test_a_rank_that_comes_too_late_hears_the_same_verdict(gloo: Gloo) -> None:
    early, late = gloo.run_ok(comes_too_late)
    assert late[0] == early[0]
    assert "rank 1 of 2" in late[0]


# Tensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [16, 100, 2**26])
def test_every_bit_of_every_dtype_and_layout_arrives(gloo: Gloo, chunk_bytes: int) -> None:
    sent = gloo.run_ok(exchange, chunk_bytes, world_size=3)[0]
    assert max(sent) <= max(chunk_bytes, 16)  # one element at least; the largest has 16 bytes
    assert sum(sent) == 2 * sum(tensor.numel() * tensor.element_size() for tensor in all_kinds_of_tensors())


def test_a_received_tensor_is_cast_and_laid_out_as_asked(gloo: Gloo) -> None:
    gloo.run_ok(receive_with_cast)


def test_a_receiver_that_dies_is_named_by_all(gloo: Gloo) -> None:
    sender, _, other = gloo.run(receiver_dies, 1, 2.0, world_size=3, lost=[1])
    assert sender == other
    assert sender[0].startswith(
        "sending the tensors failed on rank 1 of 3: no sign of life for 1.5 s (dead or frozen); "
    )


def test_the_first_cause_is_kept_when_connections_break(gloo: Gloo) -> None:
    texts = gloo.run_ok(receiver_raises, world_size=3)
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0].startswith(
        "sending the tensors failed on rank 1 of 3: MemoryError: no room; ranks 0,2 were cut off"
    )
    assert "ranks were lost earlier: sending the tensors failed on rank 1" in texts[0][1]


def test_chunks_cover_a_tensor_in_row_major_order_within_the_limit() -> None:
    import torch

    for shape in [(), (0,), (7,), (3, 4), (2, 3, 5), (1, 1, 9)]:
        tensor = torch.randn(shape)
        for limit in [1, 4, 10, 20, 40, 1000]:
            parts = list(chunks(tensor, limit))
            assert all(part.numel() * 4 <= max(limit, 4) for part in parts)
            flat = torch.cat([part.reshape(-1) for part in parts]) if parts else torch.empty(0)
            assert torch.equal(flat, tensor.reshape(-1))
            assert [part.shape for part in chunks(tensor.bfloat16(), limit, 4)] == [
                part.shape for part in parts
            ]


# Verdicts -------------------------------------------------------------------------------------------------


def test_a_cut_connection_is_a_consequence_and_not_the_cause() -> None:
    cut = ConnectionCutError("the connection to rank 1 broke: reset")
    verdict = Verdict(
        (entry("vote", "x", cut), None, entry("vote", "x", None)), {1: "no sign of life for 60 s"}
    )
    assert str(judge(verdict)) == (
        "x failed on rank 1 of 3: no sign of life for 60 s; rank 0 was cut off; rank 2 was well"
    )
    assert verdict.breaks_connections
    alone = Verdict((entry("vote", "x", cut), entry("vote", "x", None)), {})
    assert (
        str(judge(alone)) == "x failed on rank 0 of 2: the connection to rank 1 broke: reset; rank 1 was well"
    )


def test_a_verdict_without_complaint_is_no_error() -> None:
    assert judge(Verdict((entry("gather", "x", None, 1), entry("gather", "x", None, 2)), {})) is None
