"""Directories of torch DCP: what FSDP2 has spread is saved as it is, and read on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.gloo import Gloo
from support.training import adam_of, train
from support.trainings import equal
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from patchers.errors import CheckpointError, ConfigError, MissingKeysError
from sharded_ckpt.training import OptimizerState, SplitGateUp, StateDictTransforms
from sharded_ckpt.training.checkpointing import (
    CheckpointConfig,
    CheckpointType,
    GlobalState,
    _create_fsdp_dtensor_storage_writer,
    _load_model_weights_from_checkpoint,
    generate_state_dict,
    get_rng_state,
    load_fsdp_dtensor_checkpoint,
    preprocess_fsdp_dtensor_state_dict,
    save_fsdp_dtensor_checkpoint,
    set_rng_state,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
CONFIG = CheckpointConfig()


def made(spread: bool) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5, bias=False))
    if spread:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, adam_of(model)


def whole(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    state = {**model.state_dict(), **OptimizerState(model, optimizer).tensors()}
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for n, t in state.items()}


def save_spread(run: str) -> tuple[Any, torch.Tensor]:
    model, optimizer = made(spread=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    torch.manual_seed(dist.get_rank())
    state = generate_state_dict(CONFIG, model, optimizer, None, get_rng_state(), 3)
    metadata = save_fsdp_dtensor_checkpoint(f"{run}/iter_0000003", state, cfg=CONFIG, model=model)
    assert "model.0.weight" in metadata.state_dict_metadata
    return whole(model, optimizer), torch.rand(2)


def load_spread(run: str, spread: bool) -> tuple[Any, torch.Tensor, Any]:
    model, optimizer = made(spread)
    torch.manual_seed(9)
    wanted = generate_state_dict(CONFIG, model, optimizer, None, get_rng_state(), 0)
    state, path, release, kind = load_fsdp_dtensor_checkpoint(run, CONFIG, False, wanted, 3)
    assert (path, release, kind) == (f"{run}/iter_0000003", False, CheckpointType.FSDP_DTENSOR)
    OptimizerState(model, optimizer).load_state_dict({"optim": state["optimizer"]})
    set_rng_state(state["rng_state"])
    return whole(model, optimizer), torch.rand(2), state["iteration"]


def test_what_is_spread_over_two_ranks_is_read_on_two_and_as_a_whole(gloo: Gloo, tmp_path: Path) -> None:
    saved = gloo.run_ok(save_spread, str(tmp_path), world_size=2)
    for spread in (True, False):
        for rank, (found, drawn, iteration) in enumerate(
            gloo.run_ok(load_spread, str(tmp_path), spread, world_size=2)
        ):
            assert equal(found, saved[0][0])
            assert torch.equal(drawn, saved[rank][1]), "every rank has its own random numbers back"
            assert iteration == 3
    assert not torch.equal(saved[0][1], saved[1][1])
    alone = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5, bias=False))
    _load_model_weights_from_checkpoint(str(tmp_path / "iter_0000003"), alone)
    assert equal({n: t for n, t in saved[0][0].items() if n in alone.state_dict()}, dict(alone.state_dict()))


def test_what_does_not_fit_is_found_before_anything_is_filled(tmp_path: Path) -> None:
    model, _ = made(spread=False)
    train(model, [], [])
    state = generate_state_dict(CONFIG, model, None, None, None)
    save_fsdp_dtensor_checkpoint(tmp_path / "iter_0000001", state, cfg=CONFIG, model=model)
    weight = torch.zeros(6, 4)
    for extra, kind, text in (
        ({"2.weight": torch.zeros(2)}, MissingKeysError, r"lacks: model\.2\.weight"),
        ({"1.weight": torch.zeros(2)}, CheckpointError, r"model\.1\.weight has shape \(5, 6\)"),
        ({"1.weight": torch.zeros(5, 6).long()}, CheckpointError, "which is not cast blindly"),
        ({}, CheckpointError, r"no rank wants: model\.0\.bias, model\.1\.weight"),
    ):
        wanted = {"model": {"0.weight": weight, **extra}}
        with pytest.raises(kind, match=text):
            load_fsdp_dtensor_checkpoint(str(tmp_path), CONFIG, False, wanted, 1)
        assert not weight.any()
    some = CheckpointConfig(dist_ckpt_strictness="log_unexpected")
    load_fsdp_dtensor_checkpoint(str(tmp_path), some, False, {"model": {"0.weight": weight}}, 1)
    assert torch.equal(weight, model[0].weight)


def test_only_where_it_is_is_said_without_loading(tmp_path: Path) -> None:
    kind = CheckpointType.FSDP_DTENSOR
    assert load_fsdp_dtensor_checkpoint("run", CONFIG, True, None, 7) == ({}, "run/iter_0000007", False, kind)
    found = load_fsdp_dtensor_checkpoint("run", CONFIG, True, None, None, True)
    assert found[1:] == ("run/release", True, kind)
    assert load_fsdp_dtensor_checkpoint("run", CONFIG, True, None, None, False, "here")[1] == "here"
    with pytest.raises(ConfigError, match="which step is loaded"):
        load_fsdp_dtensor_checkpoint("run", CONFIG, True, None, None)
    with pytest.raises(ConfigError, match="sharded_state_dict is None"):
        load_fsdp_dtensor_checkpoint("run", CONFIG, False, None, 7)


def test_fused_projections_are_split_in_files_and_fused_again(tmp_path: Path) -> None:
    cfg = GlobalState(CONFIG, transforms=StateDictTransforms(converters=[SplitGateUp()]))
    fused = {"mlp.gate_up_proj.weight": torch.randn(6, 2), "norm._extra_state": torch.ones(1)}
    state = preprocess_fsdp_dtensor_state_dict(cfg, {"model": fused, "iteration": 3}, None)
    assert sorted(state["model"]) == ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    save_fsdp_dtensor_checkpoint(tmp_path / "iter_0000003", {"model": fused}, cfg=cfg, model=None)
    wanted = {"model": {"mlp.gate_up_proj.weight": torch.zeros(6, 2)}}
    load_fsdp_dtensor_checkpoint(str(tmp_path), CONFIG, False, wanted, 3, cfg=cfg)
    assert torch.equal(wanted["model"]["mlp.gate_up_proj.weight"], fused["mlp.gate_up_proj.weight"])


def test_what_could_not_be_read_without_risk_is_not_written(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.ones(2)}, "optimizer": {"hook": print}}
    with pytest.raises(ConfigError, match=r"the state dict\['optimizer'\]\['hook'\] is a builtin_function"):
        save_fsdp_dtensor_checkpoint(tmp_path / "a", state, cfg=CONFIG, model=None)
    assert not (tmp_path / "a").exists()


def test_a_writer_of_the_callers_own_is_used(tmp_path: Path) -> None:
    writer = _create_fsdp_dtensor_storage_writer(str(tmp_path / "own"))
    state = {"model": {"weight": torch.ones(2)}}
    save_fsdp_dtensor_checkpoint("elsewhere", state, cfg=CONFIG, model=None, storage_writer=writer)
    found = {"model": {"weight": torch.zeros(2)}}
    dcp.load(found, checkpoint_id=tmp_path / "own", no_dist=True)
    assert found["model"]["weight"].all()
