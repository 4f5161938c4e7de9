from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.gloo import Gloo

from patchers.errors import ConfigError
from sharded_ckpt.checkpoint.coordinator import Coordinator, Solo
from sharded_ckpt.runtime import Runtime, as_runtime, default_runtime


def a_runtime(**changes: Any) -> SimpleNamespace:
    facts = {"device": "cpu", "dtype": None, "global_rank": 0, "world_size": 1}
    return SimpleNamespace(**(facts | {"is_main_process": True, "is_last_process": True} | changes))


def where_am_i() -> tuple[Any, ...]:
    runtime = default_runtime(device="cpu", timeout=20)
    told = runtime.control.gather(runtime.global_rank, "telling")
    return runtime.global_rank, runtime.world_size, runtime.is_main_process, runtime.is_last_process, told


def where_in_a_part(size: int) -> tuple[int, int, bool, list[Any]]:
    import torch.distributed as dist

    groups = [dist.new_group(range(at, at + size)) for at in range(0, dist.get_world_size(), size)]
    runtime = default_runtime(device="cpu", process_group=groups[dist.get_rank() // size], timeout=20)
    told = runtime.control.gather(dist.get_rank(), "telling")
    return runtime.global_rank, runtime.world_size, runtime.is_last_process, told


def a_foreign_runtime_votes() -> list[Any]:
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    foreign = a_runtime(
        global_rank=np.int64(rank),
        world_size=size,
        is_main_process=rank == 0,
        is_last_process=rank == size - 1,
    )
    return as_runtime(foreign).control.gather(rank, "telling")


def a_runtime_that_contradicts() -> None:
    as_runtime(a_runtime(world_size=3, is_last_process=False))


def every_rank_alone() -> bool:
    return isinstance(as_runtime(a_runtime()).control, Solo)


def the_control_group_is_shared() -> bool:
    return default_runtime(device="cpu").control._links is default_runtime(device="cpu").control._links


def test_one_process_is_the_main_and_the_last() -> None:
    runtime = default_runtime(device="cpu")
    assert (runtime.global_rank, runtime.world_size, runtime.dtype) == (0, 1, None)
    assert runtime.is_main_process
    assert runtime.is_last_process
    assert isinstance(runtime.control, Solo)


def test_the_device_comes_from_the_machine_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_runtime(device="meta").device == torch.device("meta")
    monkeypatch.setenv("LOCAL_RANK", "0")
    if torch.accelerator.is_available():
        assert default_runtime().device == torch.device(torch.accelerator.current_accelerator().type, 0)
    else:
        assert default_runtime().device == torch.device("cpu")


@pytest.mark.parametrize(
    ("local_rank", "count", "index"), [("2", 4, 2), ("3", 1, 0), (None, 4, 1), ("4", 4, None)]
)
def test_local_rank_chooses_the_accelerator(
    monkeypatch: pytest.MonkeyPatch, local_rank: str | None, count: int, index: int | None
) -> None:
    """A machine with `count` accelerators is made believe: the rule is tested, not the machine."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    if index is None:
        with pytest.raises(ConfigError, match=r"LOCAL_RANK is 4, but there are 4 devices; pass device="):
            default_runtime()
    else:
        assert default_runtime().device == torch.device("xpu", index)


def test_ranks_come_from_the_process_group(gloo: Gloo) -> None:
    everyone = [0, 1, 2]
    assert gloo.run_ok(where_am_i, world_size=3) == [
        (0, 3, True, False, everyone),
        (1, 3, False, False, everyone),
        (2, 3, False, True, everyone),
    ]
    assert gloo.run_ok(where_am_i, world_size=1) == [(0, 1, True, True, [0])]
    assert gloo.run_ok(the_control_group_is_shared) == [True, True]


def test_a_part_of_the_ranks_can_share_a_model(gloo: Gloo) -> None:
    assert gloo.run_ok(where_in_a_part, 2, world_size=4) == [
        (0, 2, False, [0, 1]),
        (1, 2, True, [0, 1]),
        (0, 2, False, [2, 3]),
        (1, 2, True, [2, 3]),
    ]


def test_any_object_with_the_attributes_serves(gloo: Gloo) -> None:
    runtime = as_runtime(a_runtime(dtype=torch.bfloat16))
    assert (runtime.device, runtime.dtype, runtime.timeout) == (torch.device("cpu"), torch.bfloat16, 600.0)
    assert as_runtime(runtime) is runtime
    assert as_runtime(None).world_size == 1
    assert as_runtime(a_runtime(timeout=5)).timeout == 5
    assert gloo.run_ok(a_foreign_runtime_votes) == [[0, 1], [0, 1]]
    assert gloo.run_ok(every_rank_alone) == [True, True]


def test_missing_attributes_are_named() -> None:
    with pytest.raises(ConfigError) as failure:
        as_runtime(SimpleNamespace(device="cpu", dtype=None, global_rank=0))
    assert str(failure.value) == (
        "a SimpleNamespace cannot serve as runtime: it has no world_size, is_main_process, is_last_process. "
        "Needed are device, dtype, global_rank, world_size, is_main_process, is_last_process; "
        "default_runtime() gives all of them"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"global_rank": 2, "world_size": 2}, r"global_rank is 2; it must be in 0\.\.1"),
        ({"global_rank": -1}, r"global_rank is -1; it must be in 0\.\.0"),
        ({"global_rank": True}, "the runtime's global_rank is True; it must be an integer"),
        ({"world_size": "2"}, "the runtime's world_size is '2'; it must be an integer"),
        ({"dtype": "bfloat16"}, "the runtime's dtype is 'bfloat16'; it must be a torch.dtype or None"),
        (
            {"is_main_process": False},
            "is_main_process is False on rank 0 of 1; it must be True on rank 0 and False elsewhere",
        ),
        (
            {"is_last_process": lambda: True},
            "is_last_process is <function .* on rank 0 of 1; it must be True on",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        as_runtime(a_runtime(**changes))


def test_what_contradicts_the_process_group_is_refused(gloo: Gloo) -> None:
    texts = {failure.text for failure in gloo.run(a_runtime_that_contradicts)}
    assert texts == {
        "the runtime says rank 0 of 3, torch.distributed says rank 0 of 2",
        "the runtime says rank 0 of 3, torch.distributed says rank 1 of 2",
    }


def test_ranks_without_a_process_group_say_so_when_they_are_needed() -> None:
    runtime = as_runtime(a_runtime(world_size=2, is_last_process=False))
    assert isinstance(runtime.control, Coordinator)
    text = (
        "loading needs all 2 processes of the runtime, but torch.distributed is not initialised: "
        r"call torch\.distributed\.init_process_group first"
    )
    with pytest.raises(ConfigError, match=text):
        runtime.control.vote(None, "loading")
    with pytest.raises(ConfigError, match=text):
        runtime.control.gather(1, "loading")
    with pytest.raises(KeyError):
        runtime.control.vote(KeyError("own"), "loading")


def test_a_runtime_cannot_be_changed_into_a_wrong_one() -> None:
    runtime = Runtime(torch.device("cpu"))
    with pytest.raises(ConfigError, match="is_last_process is True on rank 0 of 2"):
        replace(runtime, world_size=2)
