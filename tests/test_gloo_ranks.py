"""The tests' own tool: were it wrong, every test of several ranks would be worth nothing."""

from __future__ import annotations

import os
import signal
import time
import warnings

import pytest
from support.gloo import Gloo, RankFailure


class LocalError(ValueError):
    pass


def rank_and_sum(value: float) -> tuple[int, float]:
    import torch
    import torch.distributed as dist

    total = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def fail_on(rank: int) -> str:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise LocalError("wrong here") from error
    return "well"


def signal_on(rank: int, number: int) -> str:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        os.kill(os.getpid(), number)
    return "well"


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def warn() -> None:
    warnings.warn("careful", UserWarning, stacklevel=1)


def leave_with_a_crash() -> None:
    import atexit

    atexit.register(os._exit, 3)


@pytest.mark.parametrize("store", ["file", "tcp"])
def test_ranks_meet_in_a_fresh_group_each_time(gloo: Gloo, store: str) -> None:
    assert gloo.run_ok(rank_and_sum, 2.0, world_size=3, store=store) == [(0, 12.0), (1, 12.0), (2, 12.0)]
    assert gloo.run_ok(rank_and_sum, 1.0, world_size=2, store=store) == [(0, 3.0), (1, 3.0)]
    assert gloo.run_ok(rank_and_sum, 1.0, world_size=1, store=store) == [(0, 1.0)]


def test_what_a_rank_raises_comes_back_with_type_text_and_cause(gloo: Gloo) -> None:
    well, failed = gloo.run(fail_on, 1)
    assert well == "well"
    assert (failed.kind, failed.type, failed.text) == ("raised", "LocalError", "wrong here")
    assert failed.cause == "KeyError: 'the cause'"
    assert type(failed.error) is LocalError
    with pytest.raises(RankFailure, match="rank 1 raised: LocalError wrong here"):
        gloo.run_ok(fail_on, 1)


def test_a_dead_rank_is_told_from_a_well_one(gloo: Gloo) -> None:
    died, well = gloo.run(signal_on, 0, signal.SIGKILL)
    assert (died.kind, died.text) == ("died", "the process ended with exit code -9")
    assert well == "well"


def test_a_frozen_or_slow_rank_costs_no_more_than_the_timeout(gloo: Gloo) -> None:
    began = time.monotonic()
    assert gloo.run(signal_on, 1, signal.SIGSTOP, lost=[1])[1].kind == "hung"
    assert [failure.kind for failure in gloo.run(sleep, 60, timeout=1)] == ["hung", "hung"]
    assert time.monotonic() - began < 10


def test_warnings_are_errors_on_ranks_too(gloo: Gloo) -> None:
    assert [failure.type for failure in gloo.run(warn)] == ["UserWarning", "UserWarning"]


def test_a_rank_that_exits_badly_after_its_work_is_found(gloo: Gloo) -> None:
    failures = gloo.run(leave_with_a_crash)
    assert [failure.text for failure in failures] == ["did its work, then left with exit code 3"] * 2
