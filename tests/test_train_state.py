"""How far a training has come, and its random numbers, survive files and come from foreign ones."""

from __future__ import annotations

import argparse
import json
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.gloo import Gloo

from patchers.errors import CheckpointError
from sharded_ckpt.training.checkpointing import GlobalState, TrainState, get_rng_state, set_rng_state
from sharded_ckpt.training.checkpointing.rng_state import check_rng_state
from sharded_ckpt.training.checkpointing.train_state import _get_train_state_from_state_dict

FAR = TrainState(7, 2**40, 3, 2**33, 2**63 + 1, True, False, True)


def through_json(value):
    return json.loads(json.dumps(value))


def test_a_train_state_survives_json_exactly():
    assert TrainState.from_plain(through_json(FAR.to_plain()), "file") == FAR


def test_a_train_state_is_a_stateful_of_tensors_without_dimensions():
    state = FAR.state_dict()
    assert {name: (tensor.dim(), tensor.dtype) for name, tensor in state.items()} == {
        **dict.fromkeys(list(state)[:4], (0, torch.int64)),
        "floating_point_operations_so_far": (0, torch.float64),
        **dict.fromkeys(("do_train", "do_valid", "do_test"), (0, torch.bool)),
    }
    found = TrainState()
    found.load_state_dict(state)
    assert (found.step, found.consumed_train_samples, found.do_test) == (7, 2**40, True)
    assert found.floating_point_operations_so_far == float(2**63 + 1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"step": None}, "train_state.json is not the state of a training: it has no step"),
        ({"stepp": 3}, "has fields that are not known here: stepp"),
        ({"step": "7"}, "step is '7', expected int"),
        ({"step": True}, "step is True, expected int"),
        ({"do_train": 1}, "do_train is 1, expected bool"),
        ({"consumed_train_samples": -1}, "consumed_train_samples is -1, less than 0"),
    ],
)
def test_a_broken_train_state_is_refused_and_changes_nothing(change, text):
    plain = {**FAR.to_plain(), **change}
    plain = {name: value for name, value in plain.items() if value is not None}
    with pytest.raises(CheckpointError, match=text):
        TrainState.from_plain(plain, "train_state.json")
    state = TrainState(step=1)
    with pytest.raises(CheckpointError, match=text.removeprefix("train_state.json ")):
        state.load_state_dict(plain)
    assert state == TrainState(step=1)


@pytest.mark.parametrize("kind", [dict, lambda **said: argparse.Namespace(**said)])
def test_a_checkpoint_of_megatron_tells_how_far_it_had_come(kind):
    args = kind(consumed_train_samples=2**40, skipped_train_samples=2, consumed_valid_samples=3)
    state = {"iteration": 9, "args": args, "num_floating_point_operations_so_far": 1e21}
    assert _get_train_state_from_state_dict(state) == TrainState(9, 2**40, 2, 3, 1e21)


def test_what_a_checkpoint_of_megatron_lacks_counts_as_nothing():
    assert _get_train_state_from_state_dict({}) == TrainState()
    old = {"iteration": 5, "args": argparse.Namespace(consumed_train_samples=None)}
    assert _get_train_state_from_state_dict(old) == TrainState(step=5)


def test_the_state_of_a_run_finds_its_checkpoint_config():
    config = object()
    assert GlobalState(config).checkpoint_config is config
    assert GlobalState(argparse.Namespace(checkpoint=config)).checkpoint_config is config


# Random numbers ---------------------------------------------------------------------------------------------


def drawn():
    normal = (random.gauss(0, 1), np.random.standard_normal(), torch.randn(3).tolist())  # these keep a spare
    return (*normal, random.random(), np.random.randint(1 << 30), torch.rand(2).tolist())


def test_all_generators_go_on_where_they_were():
    random.gauss(0, 1), np.random.standard_normal()
    state = through_json(get_rng_state())
    expected = drawn()
    drawn()
    set_rng_state(state)
    assert drawn() == expected


def draw_on_rank():
    """Draw differently on each rank, take the state, draw, go back, draw; then pretend another world."""
    torch.manual_seed(dist.get_rank())
    state = through_json(get_rng_state(module_name="vision"))
    expected = drawn()
    drawn()
    assert check_rng_state(state, dist.get_rank(), dist.get_world_size())
    set_rng_state(state)
    assert drawn() == expected
    return state, expected[2]


def test_each_rank_has_a_state_of_its_own(gloo: Gloo, caplog):
    (first, one), (second, other) = gloo.run_ok(draw_on_rank)
    assert one != other
    assert [(s["rank"], s["world_size"], s["module_name"]) for s in (first, second)] == [
        (0, 2, "vision"),
        (1, 2, "vision"),
    ]
    assert not check_rng_state(first, 0, 3, "rng/rank_00000.json")
    assert "rng/rank_00000.json: saved on 2 ranks, loaded on 3: the random number generators" in caplog.text
    with pytest.raises(CheckpointError, match="is the state of rank 0, read on rank 1"):
        check_rng_state(first, 1, 2)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("torch_rng_state", {"$bytes": "AAAA"}, "no state that a generator takes"),
        ("torch_rng_state", {"$bytes": "not base64"}, "stands for no value that is known here"),
        ("torch_rng_state", 7, "no state that a generator takes"),
        ("np_rng_state", {"$tuple": ["MT19937", {"$bytes": "AAAAAA=="}, 0, 0, 0.0]}, "no state that a gen"),
        ("random_rng_state", [1, 2, 3], "no state that a generator takes"),
        ("random_rng_state", ..., "has no random_rng_state"),
    ],
)
def test_a_broken_state_changes_no_generator(name, value, text):
    state = get_rng_state()
    state["states"] = {n: v for n, v in {**state["states"], name: value}.items() if v is not ...}
    before = get_rng_state()
    with pytest.raises(CheckpointError, match=text):
        set_rng_state(state)
    assert get_rng_state() == before


def test_something_else_is_no_state_of_generators():
    with pytest.raises(CheckpointError, match=r"rng\.json: not the state of random number generators"):
        check_rng_state({"states": {}}, 0, 1, "rng.json")
