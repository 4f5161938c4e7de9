"""The state of training: what any number of ranks saves, any other number goes on from, bit by bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support.checkpoints import files_in
from support.gloo import RankFailure
from support.pipelines import stage_of
from support.tiny import heterogeneous_checkpoint, tiny_model
from support.training import adam_of, gradient, same_values, state_by_name, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from patchers.errors import CheckpointError, CheckpointNotFoundError, CollectiveError, ConfigError
from sharded_ckpt.checkpoint.coordinator import Solo
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.loading.verbs import load_and_shard_model
from sharded_ckpt.model import create_local_shard_
from sharded_ckpt.runtime import Runtime, default_runtime
from sharded_ckpt.training import (
    GLUInterleave,
    ModelState,
    OptimizerState,
    PrefixKeys,
    SplitGateUp,
    StagedState,
    StateDictTransforms,
    load_training_state,
    save_training_state,
)
from sharded_ckpt.training.dtensors import cut


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def whole(parent: str) -> Any:
    return load_and_shard_model("auto", parent, runtime=Runtime(torch.device("cpu"), torch.float32))


def shard_of(parent: str, runtime: Runtime, owned: Any = "auto") -> Any:
    return load_and_shard_model("auto", parent, owned, runtime=runtime)


def told(results: list[Any]) -> str:
    assert all(isinstance(result, RankFailure) for result in results), results
    assert len({(result.type, result.text) for result in results}) == 1
    return results[0].text


def test_a_state_that_is_saved_at_home_is_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model, fresh = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    save_training_state("~/state", model)
    load_training_state("~/state", fresh)
    assert torch.equal(fresh.weight, model.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


# Any number of ranks ---------------------------------------------------------------------------------------


def scheduler_of(optimizer: Any) -> Any:
    return None if optimizer is None else torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def save_on_some_load_on_others(parent: str, out: str) -> list[str]:
    """Train one step and save on the first 1, 2, 3, 4 ranks; load each on 1, 2, 3, 4 and train another."""
    rank, wrong = dist.get_rank(), []
    groups = {n: dist.new_group(list(range(n))) for n in range(1, 5)}
    runtimes = {n: default_runtime(process_group=groups[n]) for n in groups if rank < n}
    reference = whole(parent)
    optimizer = adam_of(reference)
    train(reference, [optimizer], range(2))
    for n, runtime in runtimes.items():
        model = shard_of(parent, runtime)
        mine = adam_of(model)
        scheduler = scheduler_of(mine)
        train(model, filter(None, [mine]), range(1))
        if scheduler:
            scheduler.step()
        state = OptimizerState(model, mine, scheduler) if mine else None
        save_training_state(f"{out}/from-{n}", model, state, runtime=runtime, durable=False)
    dist.barrier()
    for n in groups:
        for m, runtime in runtimes.items():
            count = len(reference.model.layers)
            model = shard_of(parent, runtime, set(range(rank, count, m)) if (n + m) % 2 else "auto")
            mine = adam_of(model)
            scheduler = scheduler_of(mine)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            state = OptimizerState(model, mine, scheduler) if mine else None
            load_training_state(f"{out}/from-{n}", model, state, runtime=runtime)
            for group in mine.param_groups if mine else ():
                wrong += [] if group["lr"] == group["initial_lr"] / 2 else [f"lr of {n} on {m}"]
                group["lr"] *= 2
            train(model, filter(None, [mine]), range(1, 2))
            if odd := same_values(state_by_name(model, mine), state_by_name(reference, optimizer)):
                wrong.append(f"from {n} ranks on {m}: {odd}")
    dist.barrier()
    return wrong


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True)])
def test_any_number_of_ranks_goes_on_from_what_any_number_saved(gloo, shared, tmp_path, family, tied):
    parent = heterogeneous_checkpoint(shared, family, tied=tied)
    wrong = gloo.run_ok(save_on_some_load_on_others, str(parent), str(tmp_path), world_size=4, timeout=120)
    assert wrong == [[]] * 4


# A pipeline ------------------------------------------------------------------------------------------------


def train_over_stages(parent: Path, saved: str, fresh: bool) -> list[float]:
    """Take two steps and save, or load; then take two steps and return their losses."""
    stage = stage_of(parent)
    optimizer = adam_of(stage.shard)
    state = None if optimizer is None else OptimizerState(stage.shard, optimizer, scheduler_of(optimizer))

    def step(number: int) -> float:
        ids = torch.randint(4, 128, (4, 8), generator=torch.Generator().manual_seed(number))
        loss = stage.train_step({"input_ids": ids, "labels": ids}, micro_batches=2)
        stage.clip_grad_norm_(1.0)
        if state is not None:
            state.optimizer[0].step()
            state.optimizer[0].zero_grad()
            state.scheduler[0].step()
        return loss.item()

    if fresh:
        for number in range(2):
            step(number)
        save_training_state(saved, stage.shard, state, runtime=stage.runtime, durable=False)
    else:
        load_training_state(saved, stage.shard, state, runtime=stage.runtime)
    return [step(number) for number in range(2, 4)]


def test_a_pipeline_goes_on_as_if_it_had_not_been_interrupted_on_as_many_ranks_or_others(
    gloo, shared, tmp_path
):
    parent = heterogeneous_checkpoint(shared, "qwen3", tied=True)
    uninterrupted, _ = gloo.run_ok(train_over_stages, parent, str(tmp_path / "ckpt"), True)
    again, _ = gloo.run_ok(train_over_stages, parent, str(tmp_path / "ckpt"), False)
    assert again == uninterrupted
    for world_size in (1, 3):
        losses = gloo.run_ok(train_over_stages, parent, str(tmp_path / "ckpt"), False, world_size=world_size)[
            0
        ]
        assert losses == pytest.approx(uninterrupted, rel=1e-5)


# FSDP2 -----------------------------------------------------------------------------------------------------


def spread_and_plain(out: str) -> list[str]:
    """FSDP2 over both ranks saves, plain loads; plain saves, FSDP2 loads; all go on alike."""
    mesh = init_device_mesh("cpu", (2,))

    def made(seed: int, spread: bool) -> Any:
        model = tiny_model("qwen3", layers=2, tied=True, seed=seed)
        if spread:
            for block in model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model, adam_of(model)

    def step(model: Any, optimizer: Any, number: int) -> None:
        for name, parameter in model.named_parameters():
            whole = gradient(name, parameter.shape, number)
            spread = isinstance(parameter, DTensor)
            parameter.grad = cut(whole, parameter) if spread else whole
        optimizer.step()

    def state(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
        found = state_by_name(model, optimizer)
        return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}

    wrong = []
    for name, first, second in (("spread", True, False), ("plain", False, True), ("both", True, True)):
        model, optimizer = made(0, first)
        step(model, optimizer, 0)
        save_training_state(f"{out}/{name}", model, OptimizerState(model, optimizer), durable=False)
        other, fresh = made(1, second)
        load_training_state(f"{out}/{name}", other, OptimizerState(other, fresh))
        step(model, optimizer, 1)
        step(other, fresh, 1)
        wrong += [f"{name}: {odd}" for odd in same_values(state(other, fresh), state(model, optimizer))]
    return wrong


def test_what_fsdp_has_spread_and_what_it_has_not_read_each_others_files_bit_by_bit(gloo, tmp_path):
    assert gloo.run_ok(spread_and_plain, str(tmp_path)) == [[], []]
    expected = tiny_model("qwen3", layers=2, tied=True).state_dict()
    for name in ("spread", "plain", "both"):
        files = [load_file(path) for path in sorted((tmp_path / name / "model").glob("*.safetensors"))]
        assert (
            sum(len(file) for file in files) == len(expected) - 1
        )  # whole tensors, each once, without the head
        sizes = [sum(t.nbytes for t in file.values()) for file in files]
        assert name == "plain" or max(sizes) < 1.2 * min(sizes)  # FSDP's ranks write a share each


def spread_through_torch(out: str) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    model, other = tiny_model(layers=1), tiny_model(layers=1, seed=1)
    for one in (model, other):
        fully_shard(one, mesh=mesh)
    optimizer, fresh = adam_of(model), adam_of(other)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    dcp.save({"m": ModelState(model), "o": OptimizerState(model, optimizer)}, checkpoint_id=out)
    dcp.load({"m": ModelState(other), "o": OptimizerState(other, fresh)}, checkpoint_id=out)
    plain = tiny_model(layers=1, seed=2)
    with pytest.raises(
        ConfigError, match=r"a DTensor spread as \(Shard\(dim=0\),\) cannot be put where another"
    ):
        ModelState(plain).load_state_dict(ModelState(model).state_dict())
    assert same_values(dict(plain.state_dict()), dict(tiny_model(layers=1, seed=2).state_dict())) == []
    found, expected = state_by_name(other, fresh), state_by_name(model, optimizer)
    local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in found.items()}
    return same_values(local, {n: t.to_local() if isinstance(t, DTensor) else t for n, t in expected.items()})


def test_torchs_own_checkpoints_take_and_fill_what_fsdp_has_spread(gloo, tmp_path):
    assert gloo.run_ok(spread_through_torch, str(tmp_path / "dcp")) == [[], []]


class Experts(nn.Module):
    """A router that every rank has, and experts of which each rank may have its own."""

    def __init__(self, router: torch.Tensor, experts: torch.Tensor) -> None:
        super().__init__()
        self.router, self.experts = nn.Parameter(router), nn.Parameter(experts)


def experts_over_ranks(out: str) -> Any:
    """Two ranks with two experts each: as plain tensors, and declared as parts of one tensor."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    values = torch.arange(4 * 3 * 2.0).reshape(4, 3, 2)
    mine = values[2 * rank : 2 * rank + 2].clone()
    text = r"experts: different values on rank 0-1\..* its own experts, say so: DTensor\.from_local"
    with pytest.raises(CollectiveError, match=text):
        save_training_state(out, Experts(torch.ones(4), mine), durable=False)
    declared = Experts(torch.ones(4), DTensor.from_local(mine, mesh, [Shard(0)]))
    optimizer = adam_of(declared)
    declared.router.grad, declared.experts.grad = torch.ones(4), declared.experts.detach().clone()
    optimizer.step()
    save_training_state(out, declared, OptimizerState(declared, optimizer), durable=False)
    together = Experts(torch.zeros(4), torch.zeros(4, 3, 2))
    resumed = adam_of(together)
    load_training_state(out, together, OptimizerState(together, resumed))
    expected = state_by_name(declared, optimizer)
    expected = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in expected.items()}
    return same_values(state_by_name(together, resumed), expected)


def test_experts_of_several_ranks_are_saved_whole_once_they_are_declared(gloo, tmp_path):
    assert gloo.run_ok(experts_over_ranks, str(tmp_path / "ckpt")) == [[], []]
    assert load_file(next((tmp_path / "ckpt" / "model").glob("*.safetensors")))


def meshes_apart(out: str) -> Any:
    """Two stages of two ranks each, FSDP2 inside of each stage."""
    rank, everybody = dist.get_rank(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "fsdp"))
    stage = create_local_shard_(tiny_model(layers=4), {0, 1} if rank < 2 else {2, 3}, "auto")
    fully_shard(stage, mesh=everybody["fsdp"])
    save_training_state(out, stage, durable=False)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.zero_()
    load_training_state(out, stage)
    expected = tiny_model(layers=4).state_dict()
    return [n for n, t in stage.state_dict().items() if not torch.equal(t.full_tensor(), expected[n])]


def test_each_stage_may_have_a_mesh_of_its_own(gloo, tmp_path):
    assert gloo.run_ok(meshes_apart, str(tmp_path / "ckpt"), world_size=4) == [[]] * 4
    assert len(list((tmp_path / "ckpt" / "model").glob("*.safetensors"))) == 4


def spread_in_two_ways(out: str) -> list[str]:
    """FSDP2 over copies (HSDP), and over tensors that tensor parallelism has cut already."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))

    def made(seed: int, cut_by: str) -> Any:
        model = tiny_model(layers=1, seed=seed)
        if cut_by == "tensor parallelism":
            plan = {
                "model.layers.*.mlp.up_proj": ColwiseParallel(),
                "model.layers.*.mlp.down_proj": RowwiseParallel(),
            }
            parallelize_module(model, mesh["inner"], plan)
        fully_shard(model, mesh=mesh["outer"] if cut_by == "tensor parallelism" else mesh)
        return model, adam_of(model)

    expected = tiny_model(layers=1)
    reference = adam_of(expected)
    train(expected, [reference], range(1))
    wrong = []
    for way in ("copies", "tensor parallelism"):
        model, optimizer = made(0, way)
        for name, parameter in model.named_parameters():
            parameter.grad = cut(gradient(name, parameter.shape, 0), parameter)
        optimizer.step()
        save_training_state(f"{out}/{way}", model, OptimizerState(model, optimizer), durable=False)
        other, fresh = made(1, way)
        load_training_state(f"{out}/{way}", other, OptimizerState(other, fresh))
        found = state_by_name(other, fresh)
        whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}
        wrong += [f"{way}: {name}" for name in same_values(whole, state_by_name(expected, reference))]
    return wrong


def test_meshes_of_two_dimensions_are_put_together_and_cut_alike(gloo, tmp_path):
    assert gloo.run_ok(spread_in_two_ways, str(tmp_path), world_size=4) == [[]] * 4


# Copies ----------------------------------------------------------------------------------------------------


def save_copies(out: str, what: str) -> Any:
    """Both ranks have the whole model, as under data parallelism; on rank 1 something may have diverged."""
    model = tiny_model(layers=1)
    optimizer = adam_of(model)
    train(model, [optimizer], range(1))
    norm = model.model.norm.weight
    if dist.get_rank() == 1 and what == "weights":
        norm.data += 1
    if dist.get_rank() == 1 and what == "optimizer":
        optimizer.state[norm]["exp_avg"] += 1
    if dist.get_rank() == 1 and what == "options":
        optimizer.param_groups[0]["lr"] = 7.0
    save_training_state(out, model, OptimizerState(model, optimizer), durable=False)
    fresh = adam_of(model)
    load_training_state(out, model, OptimizerState(model, fresh))
    return same_values(state_by_name(model, fresh), state_by_name(model, optimizer))


def test_equal_copies_are_written_once(gloo, tmp_path):
    assert gloo.run_ok(save_copies, str(tmp_path / "ckpt"), "nothing") == [[], []]
    assert len(list((tmp_path / "ckpt").glob("*/*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (
            "weights",
            r"ranks have tensors of one name that are not the same: model\.norm\.weight: different values",
        ),
        ("optimizer", r"not the same: state\.model\.norm\.weight\.exp_avg: different values on rank 0-1"),
        ("options", r"the ranks' optimizers have different options for .*lm_head\.weight"),
    ],
)
def test_copies_that_have_diverged_are_refused_with_their_names(gloo, tmp_path, what, text):
    assert re.search(text, told(gloo.run(save_copies, str(tmp_path / "ckpt"), what)))
    assert not (tmp_path / "ckpt").exists()


# Faults ----------------------------------------------------------------------------------------------------


def save_with_a_fault(out: str, kind: str) -> None:
    rank = dist.get_rank()
    runtime = default_runtime(timeout=20)
    model = create_local_shard_(tiny_model(layers=2), {rank}, "auto")
    optimizer = adam_of(model)
    train(model, [optimizer], range(1))
    scheduler = None
    if rank == 1 and kind == "odd state":
        optimizer.state[next(iter(optimizer.state))]["hook"] = print
    if kind == "meta":
        save_training_state(out, model.to("meta") if rank == 1 else model, runtime=runtime, durable=False)
    if kind == "options" and rank == 1:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        scheduler.last_epoch = 5
    elif kind == "options":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if kind == "nobody" and rank == 1:
        model = create_local_shard_(tiny_model(layers=2), {0}, "auto")
        optimizer = adam_of(model)
    save_training_state(
        out, model, OptimizerState(model, optimizer, scheduler), runtime=runtime, durable=False
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("odd state", r"rank 1 of 2: ConfigError: the optimizer state of .*\['hook'\] is a builtin_function"),
        (
            "meta",
            r"rank 1 of 2: CheckpointError: these tensors cannot be saved: .* on the meta device",
        ),
        ("options", r"the ranks' schedulers disagree on last_epoch"),
        ("nobody", r"no rank owns .*model\.layers\.1"),
    ],
)
def test_a_rank_that_cannot_save_is_named_on_all_ranks_and_what_was_there_stays(gloo, tmp_path, kind, text):
    save_training_state(tmp_path / "ckpt", nn.Linear(2, 2), durable=False)
    before = files_in(tmp_path / "ckpt")
    assert re.search(text, told(gloo.run(save_with_a_fault, str(tmp_path / "ckpt"), kind)))
    assert files_in(tmp_path / "ckpt") == before
    assert load_training_state(tmp_path / "ckpt", nn.Linear(2, 2))


def load_with_a_fault(saved: str, kind: str) -> Any:
    rank = dist.get_rank()
    model = create_local_shard_(tiny_model(layers=4, seed=1), {0, 1} if rank == 0 else {2, 3}, "auto")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind == "one more" and rank == 1:
        model.model.layers[3].register_buffer("more", torch.zeros(1))
    if kind == "fewer":
        model = create_local_shard_(tiny_model(layers=3, seed=1), {0, 1} if rank == 0 else {2}, "auto")
        before = dict(model.state_dict())
    if kind == "shape" and rank == 0:
        model.model.norm = nn.Linear(1, 1)
        model.model.layers[1].mlp.up_proj = nn.Linear(64, 10, bias=False)
        before = dict(model.state_dict())
    try:
        load_training_state(saved, model)
    except CollectiveError as error:
        text = str(error)
    except CheckpointError as error:
        text = str(error)
    else:
        text = "nothing was wrong"
    untouched = all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before)
    return text, untouched


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("one more", r"the model wants, on rank 1, and the checkpoint lacks: model\.layers\.3\.more"),
        ("fewer", r"the checkpoint has, and no rank wants: model\.layers\.3\.input_layernorm\.weight"),
        (
            "shape",
            r"rank 0 of 2: CheckpointError: .*up_proj\.weight has shape \(96, 64\) in the checkpoint, the",
        ),
    ],
)
def test_what_one_rank_finds_wrong_all_ranks_raise_and_nothing_is_loaded(gloo, shared, kind, text):
    saved = shared / "four blocks"
    if not saved.exists():
        save_training_state(saved, tiny_model(layers=4), durable=False)
    results = gloo.run_ok(load_with_a_fault, str(saved), kind)
    assert results[0] == results[1]
    assert re.search(text, results[0][0]), results[0][0]
    assert results[0][1]


def test_what_is_no_training_state_or_a_newer_one_says_so(tmp_path):
    with pytest.raises(
        CheckpointNotFoundError, match=r"no training state: expected training_state\.json, found not"
    ):
        load_training_state(tmp_path, nn.Linear(2, 2))
    save_training_state(tmp_path, nn.Linear(2, 2), durable=False)
    info = json.loads((tmp_path / "training_state.json").read_text())
    (tmp_path / "training_state.json").write_text(json.dumps({**info, "version": 99}))
    with pytest.raises(CheckpointError, match=r"version 99, but only 1 is known here: update"):
        load_training_state(tmp_path, nn.Linear(2, 2))
    (tmp_path / "training_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"not the file of a training state"):
        load_training_state(tmp_path, nn.Linear(2, 2))


# Strictness ------------------------------------------------------------------------------------------------


MODES = {
    "assume_ok_unexpected": ("raises", "passes"),
    "log_unexpected": ("logs", "passes"),
    "log_all": ("logs", "logs"),
    "raise_unexpected": ("raises", "passes"),
    "raise_all": ("raises", "raises"),
    "return_unexpected": ("returns", "passes"),
    "return_all": ("returns", "returns"),
    "ignore_all": ("returns", "passes"),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_strictness_does_what_it_says_about_either_side(tmp_path, caplog, mode):
    both = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    one = nn.ModuleDict({"a": both["a"]})
    for saved, loaded, what in ((one, both, MODES[mode][0]), (both, one, MODES[mode][1])):
        save_training_state(tmp_path, saved, durable=False)
        caplog.clear()
        if what == "raises":
            with pytest.raises(CheckpointError, match=r"b\.weight"):
                load_training_state(tmp_path, loaded, strictness=mode)
            continue
        report = load_training_state(tmp_path, loaded, strictness=mode)
        assert report.filled == 1
        assert ("b.weight" in report.missing + report.unexpected) == (what in ("returns", "logs"))
        assert ("b.weight" in caplog.text) == (what == "logs")


def test_an_unknown_strictness_names_the_known_ones(tmp_path):
    with pytest.raises(
        ConfigError, match=r"strictness is 'maybe'; it must be one of assume_ok_unexpected, log_"
    ):
        load_training_state(tmp_path, nn.Linear(1, 1), strictness="maybe")


# Forms in files --------------------------------------------------------------------------------------------


class Fused(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"gate_up_proj": nn.Linear(3, 2 * w)}) for w in widths)


def test_what_memory_has_in_another_form_is_stored_plainly_and_comes_back(tmp_path):
    model, other = Fused([4, 6, 2]), Fused([4, 6, 2])
    transforms = StateDictTransforms(
        converters=[SplitGateUp(), GLUInterleave({0: 2, 1: 3}), PrefixKeys("p.")]
    )
    save_training_state(tmp_path, model, transforms=transforms, durable=False)
    stored = load_file(tmp_path / "model" / "model-00001-of-00001.safetensors")
    assert len(stored) == 12
    fused = model.layers[0]["gate_up_proj"].weight
    assert torch.equal(stored["p.layers.0.gate_proj.weight"], fused[[0, 1, 4, 5]])
    assert load_training_state(tmp_path, other, transforms=transforms).filled == 6
    assert same_values(dict(other.state_dict()), dict(model.state_dict())) == []
    again = StateDictTransforms(converters=[SplitGateUp(), GLUInterleave({0: 1, 1: 2}), PrefixKeys("p.")])
    load_training_state(tmp_path, other, transforms=again)  # files know nothing of how memory interleaves
    assert torch.equal(other.layers[0]["gate_up_proj"].weight[0::2], fused[[0, 1, 4, 5]])
    optimizer = OptimizerState(model, torch.optim.AdamW(model.parameters()))
    fresh = OptimizerState(other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(
        CheckpointError, match=r"optimizer state has the form of memory, and the two would not"
    ):
        load_training_state(tmp_path, other, fresh, transforms=again)
    assert optimizer.table().shapes["layers.0.gate_up_proj.weight"] == (8, 3)


KINDS = {
    "scalar": torch.tensor(3.5),
    "count": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "packed": torch.ones(4).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 3),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}


def test_buffers_of_every_kind_come_back_and_those_that_are_not_persistent_are_left_out(tmp_path):
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    for name, tensor in KINDS.items():
        model.register_buffer(name, tensor)
        other.register_buffer(name, torch.zeros_like(tensor))
    model.register_buffer("scratch", torch.ones(1), persistent=False)
    save_training_state(tmp_path, model, durable=False)
    assert "scratch" not in load_file(tmp_path / "model" / "model-00001-of-00001.safetensors")
    assert load_training_state(tmp_path, other)
    for name, tensor in KINDS.items():
        assert torch.equal(getattr(other, name).float(), tensor.float())


def test_nothing_is_pickled_and_a_snapshot_is_of_its_moment(tmp_path):
    model = tiny_model(layers=1)
    optimizer = adam_of(model)
    train(model, [optimizer], range(1))
    expected = {name: tensor.clone() for name, tensor in state_by_name(model, optimizer).items()}
    staged = StagedState.gather(ModelState(model), OptimizerState(model, optimizer), Solo()).snapshot()
    train(model, [optimizer], range(1, 3))
    with transaction(tmp_path / "ckpt", durable=False) as save:
        staged.write(save)
        save.write_json("more.json", {"written": "by the caller, in the same save"})
    load_training_state(tmp_path / "ckpt", model, OptimizerState(model, optimizer))
    assert same_values(state_by_name(model, optimizer), expected) == []
    assert {Path(name).suffix for name in files_in(tmp_path / "ckpt")} == {".json", ".safetensors"}
