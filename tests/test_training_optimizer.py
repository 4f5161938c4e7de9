"""Optimizers and schedulers as state: by names, exactly, whatever groups they have."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.tiny import tiny_model
from support.training import adam_of, same_values, state_by_name, train
from torch import nn

from patchers.errors import CheckpointError, ConfigError, MissingKeysError
from sharded_ckpt.training import OptimizerState, load_training_state, save_training_state
from sharded_ckpt.training.optimizer_table import OptimizerTable, ParamOptions, merge
from sharded_ckpt.training.plain import from_plain, to_plain


def trained(model: nn.Module, optimizer: Any, steps: int = 2) -> Any:
    train(model, [optimizer], range(steps))
    return optimizer


OPTIMIZERS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, amsgrad=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, centered=True, momentum=0.5),
    "NAdam": lambda ps: torch.optim.NAdam(ps),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_fresh_optimizer_goes_on_exactly_where_a_saved_one_was(tmp_path, kind):
    model, make = tiny_model(layers=1), OPTIMIZERS[kind]
    optimizer = trained(model, make(model.parameters()))
    save_training_state(tmp_path, model, OptimizerState(model, optimizer), durable=False)
    other = tiny_model(layers=1, seed=1)
    fresh = make(other.parameters())
    load_training_state(tmp_path, other, OptimizerState(other, fresh))
    train(model, [optimizer], range(2, 4))
    train(other, [fresh], range(2, 4))
    assert same_values(state_by_name(other, fresh), state_by_name(model, optimizer)) == []


def test_an_optimizer_with_state_is_filled_in_place_and_half_precision_keeps_its_state(tmp_path):
    model = tiny_model(layers=1, dtype=torch.bfloat16)
    optimizer = trained(model, adam_of(model))
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float() + 1e-6  # more than the parameter's dtype can hold
    save_training_state(tmp_path, model, OptimizerState(model, optimizer), durable=False)
    for fresh in (True, False):
        other = tiny_model(layers=1, dtype=torch.bfloat16, seed=1)
        mine = adam_of(other)
        kept = None if fresh else next(iter(trained(other, mine).state.values()))["exp_avg_sq"]
        load_training_state(tmp_path, other, OptimizerState(other, mine))
        assert same_values(state_by_name(other, mine), state_by_name(model, optimizer)) == []
        assert fresh or next(iter(mine.state.values()))["exp_avg_sq"] is kept


def test_options_follow_their_parameters_into_other_groups(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    a, b = model[0].parameters(), model[1].parameters()
    optimizer = torch.optim.AdamW([{"params": a, "lr": 1e-3}, {"params": b, "lr": 5e-4, "betas": (0.5, 0.9)}])
    save_training_state(tmp_path, model, OptimizerState(model, optimizer), durable=False)
    turned = torch.optim.AdamW([{"params": model[1].parameters()}, {"params": model[0].parameters()}])
    load_training_state(tmp_path, model, OptimizerState(model, turned))
    assert [(g["lr"], g["betas"]) for g in turned.param_groups] == [(5e-4, (0.5, 0.9)), (1e-3, (0.9, 0.999))]
    one = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model[0].weight.fill_(5)
    with pytest.raises(ConfigError, match=r"share a group here had different lr, betas when they were saved"):
        load_training_state(tmp_path, model, OptimizerState(model, one))
    assert model[0].weight.eq(5).all()


def test_a_fresh_optimizer_is_saved_as_it_is_and_stays_untouched(tmp_path):
    model = tiny_model(layers=1)
    optimizer = adam_of(model)
    save_training_state(tmp_path, model, OptimizerState(model, optimizer), durable=False)
    assert not optimizer.state
    other = adam_of(model)
    load_training_state(tmp_path, model, OptimizerState(model, trained(model, other)))
    assert not other.state


def test_parameters_that_never_had_a_gradient_have_no_state_and_others_keep_theirs(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    model[0].weight.grad = torch.ones(2, 2)
    optimizer.step()
    save_training_state(tmp_path, model, OptimizerState(model, optimizer), durable=False)
    fresh = torch.optim.AdamW(model.parameters())
    load_training_state(tmp_path, model, OptimizerState(model, fresh))
    assert list(fresh.state) == [model[0].weight]


def test_several_parts_and_optimizers_are_one_state(tmp_path):
    whole = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    parts = [nn.ModuleDict({"a": whole["a"]}), nn.ModuleDict({"b": whole["b"]})]
    optimizers = [torch.optim.AdamW(part.parameters()) for part in parts]
    train(whole, optimizers, range(2))
    save_training_state(tmp_path, whole, OptimizerState(parts, optimizers), durable=False)
    fresh = torch.optim.AdamW(whole.parameters())
    load_training_state(tmp_path, whole, OptimizerState(whole, fresh))
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            assert all(torch.equal(fresh.state[parameter][slot], value) for slot, value in state.items())


def test_what_an_optimizer_trains_must_be_in_the_model():
    model = nn.Linear(2, 2)
    with pytest.raises(
        ConfigError, match=r"group 0 of the SGD has a parameter of shape \(3,\) that is no part"
    ):
        OptimizerState(model, torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1))


def test_a_parameter_without_saved_state_or_of_another_shape_is_refused_and_nothing_is_touched(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    first = trained(model, torch.optim.AdamW(model["a"].parameters()), 1)
    save_training_state(tmp_path, model, OptimizerState(model, first), durable=False)
    before = copy.deepcopy(model.state_dict())
    both = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model["a"].weight += 1
    with pytest.raises(
        MissingKeysError, match=r"no optimizer state of b\.weight, which an optimizer here trains"
    ):
        load_training_state(tmp_path, model, OptimizerState(model, both))
    assert torch.equal(model["a"].weight, before["a.weight"] + 1)
    assert not both.state


def test_state_of_what_nobody_trains_any_more_is_an_error_unless_asked_otherwise(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    both = trained(model, torch.optim.AdamW(model.parameters()), 1)
    save_training_state(tmp_path, model, OptimizerState(model, both), durable=False)
    one = torch.optim.AdamW(model["a"].parameters())
    with pytest.raises(
        CheckpointError, match=r"optim: the checkpoint has, and no rank wants: state\.b\.weight\.exp"
    ):
        load_training_state(tmp_path, model, OptimizerState(model, one))
    load_training_state(tmp_path, model, OptimizerState(model, one), strictness="log_all")
    assert torch.equal(one.state[model["a"].weight]["exp_avg"], both.state[model["a"].weight]["exp_avg"])


def test_another_kind_of_optimizer_is_told(tmp_path, caplog):
    model = nn.Linear(2, 2)
    save_training_state(
        tmp_path,
        model,
        OptimizerState(model, trained(model, torch.optim.AdamW(model.parameters()))),
        durable=False,
    )
    load_training_state(tmp_path, model, OptimizerState(model, torch.optim.Adam(model.parameters())))
    assert "the state was saved from AdamW and is loaded into Adam" in caplog.text


# torch's own checkpoints -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_torchs_own_checkpoints_fill_a_fresh_adam_exactly(tmp_path):
    model = tiny_model(layers=1)
    optimizer = trained(model, adam_of(model))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, [optimizer], range(2, 3))
    scheduler.step()
    dcp.save({"o": OptimizerState(model, optimizer, scheduler)}, checkpoint_id=tmp_path, no_dist=True)
    fresh = adam_of(model)
    again = torch.optim.lr_scheduler.StepLR(fresh, 1)
    dcp.load({"o": OptimizerState(model, fresh, again)}, checkpoint_id=tmp_path, no_dist=True)
    assert same_values(state_by_name(model, fresh), state_by_name(model, optimizer)) == []
    assert again.last_epoch == 1
    assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_a_fresh_adam_shown_to_torch_counts_no_step():
    model, twin = tiny_model(layers=1), tiny_model(layers=1)
    shown, other = adam_of(model), adam_of(twin)
    flat = OptimizerState(model, shown).state_dict()["optim"]
    assert flat["state.lm_head.weight.step"].item() == 0
    train(model, [shown], range(2))
    train(twin, [other], range(2))
    assert same_values(state_by_name(model, shown), state_by_name(twin, other)) == []


def test_a_flat_state_dict_is_compared_before_it_is_loaded():
    model = nn.Linear(2, 2)
    optimizer = trained(model, torch.optim.AdamW(model.parameters()))
    state = OptimizerState(model, optimizer)
    flat = {
        k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.state_dict()["optim"].items()
    }
    other = OptimizerState(model, torch.optim.AdamW(model.parameters()))
    other.load_state_dict({"optim": flat})
    assert other.optimizer[0].state[model.weight]["step"].item() == 2
    with pytest.raises(CheckpointError, match=r"state is also of elsewhere, which is not trained here"):
        other.load_state_dict({"optim": {**flat, "state.elsewhere.step": torch.tensor(1.0)}})
    with pytest.raises(CheckpointError, match=r"exp_avg has shape \(3, 2\), the parameter here has \(2, 2\)"):
        other.load_state_dict({"optim": {**flat, "state.weight.exp_avg": torch.zeros(3, 2)}})
    with pytest.raises(CheckpointError, match=r"0 is no key of a flat optimizer state dict"):
        other.load_state_dict({"optim": {**flat, "0": torch.zeros(3, 2)}})
    with pytest.raises(MissingKeysError, match=r"no optimizer state of weight"):
        other.load_state_dict({"optim": {k: v for k, v in flat.items() if ".weight." not in k}})


# Schedulers ------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
    "milestones": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 1, 3], 0.5),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "in turn": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.CosineAnnealingLR(o, 5)],
        [2],
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_go_on_where_they_were(tmp_path, kind):
    def made() -> tuple[nn.Module, Any, Any]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, SCHEDULERS[kind](optimizer)

    def stepped(optimizer: Any, scheduler: Any) -> list[float]:
        rates = []
        for _ in range(4):
            optimizer.step()
            scheduler.step(*([1.0] if kind == "plateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    model, optimizer, scheduler = made()
    stepped(optimizer, scheduler)
    save_training_state(tmp_path, model, OptimizerState(model, optimizer, scheduler), durable=False)
    other, fresh, again = made()
    load_training_state(tmp_path, other, OptimizerState(other, fresh, again))
    assert stepped(fresh, again) == stepped(optimizer, scheduler)


def test_a_scheduler_of_other_groups_is_refused_before_anything_is_loaded(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.SGD([{"params": part.parameters()} for part in model], lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=[0.1, 0.2])
    save_training_state(tmp_path, model, OptimizerState(model, optimizer, plateau), durable=False)
    one = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.lr_scheduler.ReduceLROnPlateau(one)
    with torch.no_grad():
        model[0].weight.fill_(5)
    with pytest.raises(ConfigError, match=r"with 2 parameter groups that have different min_lrs; here are 1"):
        load_training_state(tmp_path, model, OptimizerState(model, one, other))
    assert model[0].weight.eq(5).all()


def test_a_scheduler_that_was_not_saved_is_told(tmp_path, caplog):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save_training_state(tmp_path, model, OptimizerState(model, optimizer), durable=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    load_training_state(tmp_path, model, OptimizerState(model, optimizer, scheduler))
    assert "no state of a scheduler was saved: the StepLR starts afresh" in caplog.text


def test_schedulers_out_of_step_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2) for optimizer in optimizers]
    optimizers[0].step()
    schedulers[0].step()
    with pytest.raises(ConfigError, match=r"not in step: they have different .*last_epoch"):
        OptimizerState(model, optimizers, schedulers).state_dict()


# Plain data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"a": (1, [2.5, None]), 3: {"$tuple": "x"}, "s": {1, 2}},
        [math.inf, -math.inf, 0.1 + 0.2, 5e-324],
        Counter({3: 2}),
        torch.float16,
        {},
        {"$x": 1},
    ],
)
def test_plain_data_comes_back_exactly(value):
    found = from_plain(to_plain(value))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_small_tensors_come_back_bit_by_bit(dtype):
    tensor = (torch.randn(3, 2, dtype=torch.float64) * 5).to(dtype)
    found = from_plain(to_plain(tensor))
    assert found.dtype == dtype
    assert torch.equal(found, tensor)


def test_what_is_no_plain_data_is_refused_by_name_and_nothing_is_pickled():
    with pytest.raises(
        ConfigError, match=r"value\['f'\]\[0\] is a function, which cannot be written as plain"
    ):
        to_plain({"f": [lambda: 0]})
    with pytest.raises(ConfigError, match=r"a tensor of shape \(8193,\).*up to 8192 elements"):
        to_plain(torch.zeros(8193))
    with pytest.raises(CheckpointError, match=r"stands for no value that is known here"):
        from_plain({"$module": "os"})
    with pytest.raises(CheckpointError, match=r"here: not the state of an optimizer: KeyError 'groups'"):
        OptimizerTable.from_plain({}, "here")


def test_ranks_that_disagree_about_a_parameter_or_a_scheduler_are_refused():
    def table(lr: float, epoch: int) -> OptimizerTable:
        options = ParamOptions({"w": (2,)}, {"lr": lr})
        return OptimizerTable(("SGD",), (options,), {}, {"last_epoch": epoch})

    assert merge([table(0.1, 1), table(0.1, 1), OptimizerTable()]).shapes == {"w": (2,)}
    with pytest.raises(CheckpointError, match=r"optimizers have different options for w"):
        merge([table(0.1, 1), table(0.2, 1)])
    with pytest.raises(CheckpointError, match=r"schedulers disagree on last_epoch: step them alike"):
        merge([table(0.1, 1), table(0.1, 2)])
