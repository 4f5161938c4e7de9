"""What is saved beside model and optimizer: where the data is, tokenizer, config, GLU in its two forms."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.gloo import Gloo
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import LlamaConfig

from patchers.errors import CheckpointError, CollectiveError, ConfigError
from sharded_ckpt.demo.tiny import _byte_tokenizer
from sharded_ckpt.training import GlobalState, StateDictTransforms
from sharded_ckpt.training.checkpointing import (
    maybe_load_dataloader_state,
    maybe_save_dataloader_state,
    save_tokenizer_assets,
)
from sharded_ckpt.training.checkpointing.config import CheckpointConfig
from sharded_ckpt.training.checkpointing.dataloader_state import dataloader_state_of, load_dataloader_state
from sharded_ckpt.training.checkpointing.glu_interleave import (
    _get_model_glu_interleave_sizes,
    _is_swiglu_fc1_checkpoint_key,
    _process_state_dict_for_glu_interleaving,
    _process_state_dict_for_model_glu_interleaving,
    glu_converters,
)
from sharded_ckpt.training.checkpointing.run_config import read_run_config, run_config_of
from sharded_ckpt.training.glu import _interleave_glu_tensor

# Data -------------------------------------------------------------------------------------------------------


class Loader:
    """A loader that shuffles, and knows where it is, as torchdata's do."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.taken = 0

    def __next__(self) -> int:
        self.taken += 1
        return int(torch.randint(1 << 30, (), generator=self.generator))

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "generator": self.generator.get_state(), 3: (b"\0\xff", None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state[3] == (b"\0\xff", None)
        self.taken = state["taken"]
        self.generator.set_state(state["generator"])


class Energon:
    """An iterator as Megatron's trainers have it."""

    def __init__(self) -> None:
        self.iterable = self
        self.place = 5

    def save_state(self) -> int:
        return self.place

    def restore_state(self, place: int) -> None:
        self.place = place


def test_a_loader_goes_on_where_it_was() -> None:
    loader, other = Loader(), Loader(1)
    next(loader)
    plain = json.loads(json.dumps(dataloader_state_of(loader)))
    load_dataloader_state(other, plain)
    assert [next(other) for _ in range(3)] == [next(loader) for _ in range(3)]
    energon, another = Energon(), Energon()
    another.place = 0
    load_dataloader_state(another, dataloader_state_of(energon))
    assert another.place == 5


def test_a_loader_that_keeps_no_state_is_refused() -> None:
    assert dataloader_state_of(None) is None
    with pytest.raises(ConfigError, match=r"a list_iterator cannot say where in the data it is"):
        dataloader_state_of(iter([1]))
    strange = SimpleNamespace(state_dict=lambda: {"hook": print}, load_state_dict=print)
    with pytest.raises(
        ConfigError, match=r"the state of the SimpleNamespace\['hook'\] is a builtin_function"
    ):
        dataloader_state_of(strange)
    with pytest.raises(CheckpointError, match=r"x\.json: not the state of a data loader"):
        load_dataloader_state(Loader(), {"step": 3}, "x.json")


def test_nothing_happens_without_a_loader_or_a_path(tmp_path: Path) -> None:
    maybe_save_dataloader_state([], None, 3, tmp_path / "data")
    maybe_save_dataloader_state([], Loader(), 3, None)
    maybe_save_dataloader_state([], Loader(), 3, "")
    assert not maybe_load_dataloader_state(None, 3, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_an_iteration_that_is_not_there_begins_anew(tmp_path: Path, caplog) -> None:
    loader = Loader()
    maybe_save_dataloader_state([], loader, 3, tmp_path)
    assert not maybe_load_dataloader_state(loader, 4, tmp_path)
    assert "iter_0000004: nothing was saved there: the data begins anew" in caplog.text
    assert maybe_load_dataloader_state(loader, 3, tmp_path)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    maybe_save_dataloader_state([], Loader(), 3, "~/data")
    assert (tmp_path / "data").is_dir()
    assert maybe_load_dataloader_state(Loader(), 3, "~/data")


def save_on_a_grid(path: str) -> list[Any]:
    """Two pipelines of two stages save; all ranks load. Then one pipeline of four saves over it."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    groups = SimpleNamespace(dp=mesh["dp"].get_group(), pp=mesh["pp"].get_group())
    loader, other = Loader(mesh.get_local_rank("dp")), Loader(9)
    maybe_save_dataloader_state([], loader, 10, path, pg_collection=groups)
    two = sorted(entry.name for entry in (Path(path) / "iter_0000010").iterdir())
    assert maybe_load_dataloader_state(other, 10, path, pg_collection=groups)
    dist.barrier()
    maybe_save_dataloader_state([], Loader(rank), 10, path)
    one = sorted(entry.name for entry in (Path(path) / "iter_0000010").iterdir())
    try:
        maybe_load_dataloader_state(other, 10, path, pg_collection=groups)
        said = "nothing"
    except CollectiveError as error:
        said = str(error)
    return [two, next(other) == next(loader), one, said]


def test_each_pipeline_has_one_writer_and_what_it_replaces_goes(gloo: Gloo, tmp_path: Path) -> None:
    for two, same, one, said in gloo.run_ok(save_on_a_grid, str(tmp_path), world_size=4):
        assert two == ["train_dataloader_dprank000.json", "train_dataloader_dprank001.json"]
        assert same
        assert one == ["train_dataloader_dprank000.json"]
        assert "failed on ranks 2-3 of 4: CheckpointError:" in said
        assert "train_dataloader_dprank001.json is not there, but train_dataloader_dprank000.json" in said
        assert "Go on with as many, or remove the directory" in said


# Tokenizers -------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_transformers_is_saved_and_opens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = _byte_tokenizer()
    save_tokenizer_assets(SimpleNamespace(_tokenizer=tokenizer), None, tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert found("blöcke").input_ids == tokenizer("blöcke").input_ids


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("BertWordPieceCase", {"vocab_file": "vocab.txt"}),
        ("GPT2BPETokenizer", {"vocab_file": "vocab.json", "merge_file": "merges.txt"}),
        ("SentencePieceTokenizer", {"tokenizer_model": "tokenizer.model"}),
        ("Llama2Tokenizer", {"tokenizer_model": "tokenizer.model"}),
        ("TikTokenizer", {"tokenizer_model": "tokenizer.json"}),
        ("NullTokenizer", {}),
    ],
)
def test_a_tokenizer_of_megatron_is_its_files(tmp_path: Path, kind: str, files: dict[str, str]) -> None:
    config = SimpleNamespace(tokenizer_type=kind)
    for field, name in files.items():
        setattr(config, field, tmp_path / f"my-{name}")
        (tmp_path / f"my-{name}").write_text(field)
    save_tokenizer_assets(object(), config, tmp_path / "out")
    found = {path.name: path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {name: field for field, name in files.items()}


def test_what_is_missing_of_a_tokenizer_is_said(tmp_path: Path, caplog) -> None:
    config = SimpleNamespace(tokenizer_type="GPT2BPETokenizer", vocab_file=tmp_path / "gone", merge_file=None)
    save_tokenizer_assets(object(), config, tmp_path)
    assert f"vocab.json is not saved: vocab_file is {tmp_path}/gone, which is no file" in caplog.text
    assert "merges.txt is not saved: merge_file is None, which is no file" in caplog.text
    save_tokenizer_assets(object(), None, tmp_path)
    assert "the tokenizer is not saved: a object has no save_pretrained" in caplog.text


def test_only_the_first_rank_saves_a_tokenizer(tmp_path: Path) -> None:
    other = SimpleNamespace(
        device="cpu", dtype=None, global_rank=1, world_size=2, is_main_process=False, is_last_process=True
    )
    save_tokenizer_assets(_byte_tokenizer(), None, tmp_path, runtime=other)
    save_tokenizer_assets(None, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


# The config of the run --------------------------------------------------------------------------------------


@dataclass
class Run:
    checkpoint: CheckpointConfig
    model: Any
    dtype: torch.dtype
    betas: tuple[float, float]
    fn: Any


def test_the_config_of_a_run_is_told_as_plain_data(tmp_path: Path) -> None:
    cfg = Run(
        CheckpointConfig(save=tmp_path, save_interval=2),
        LlamaConfig(num_hidden_layers=3),
        torch.bfloat16,
        (0.9, float("inf")),
        object(),
    )
    told = run_config_of(GlobalState(cfg))
    assert json.loads(json.dumps(told)) == told
    assert told["checkpoint"]["save"] == str(tmp_path)
    assert told["model"]["num_hidden_layers"] == 3
    assert (told["dtype"], told["betas"], told["fn"]) == ("torch.bfloat16", [0.9, "inf"], "<object object>")
    assert run_config_of(GlobalState(cfg.checkpoint))["checkpoint"]["save_interval"] == 2
    (tmp_path / "run_config.json").write_text(json.dumps(told))
    assert read_run_config(tmp_path) == told


# GLU --------------------------------------------------------------------------------------------------------

DENSE, ROUTED, SHARED = (
    f"decoder.layers.1.mlp.{part}linear_fc1.weight" for part in ("", "experts.", "shared_experts.")
)


@pytest.mark.parametrize(
    ("key", "kinds"),
    [
        (DENSE, "dense"),
        (DENSE.replace("weight", "bias"), "dense"),
        ("model.layers.0.mlp.gate_up_proj.weight", "dense"),
        (ROUTED, "routed"),
        ("layers.0.mlp.experts.local_experts.7.linear_fc1.bias", "routed"),
        (SHARED, "shared"),
        ("model.layers.0.mlp.shared_expert.gate_up_proj.weight", "shared"),
        (DENSE.replace("fc1", "fc2"), ""),
        (DENSE + ".scale", ""),
        ("decoder.layers.0.self_attention.linear_fc1.weight", ""),
    ],
)
def test_which_keys_are_gate_and_up_projections(key: str, kinds: str) -> None:
    names = {"dense": "include_dense", "routed": "include_routed_experts", "shared": "include_shared_experts"}
    for kind in names:
        only = {option: name == kind for name, option in names.items()}
        assert _is_swiglu_fc1_checkpoint_key(key, **only) == (kind == kinds)


@pytest.mark.parametrize(("routed", "shared"), [(4, 4), (2, 8), (None, 4), (4, None)])
def test_each_kind_of_ffn_is_interleaved_by_its_size_and_back(routed: int | None, shared: int | None) -> None:
    state = {name: torch.randn(32, 3) for name in (DENSE, ROUTED, SHARED, "other.weight")}
    state[DENSE.replace("weight", "bias")] = torch.randn(32)
    state["step"] = 7
    changed = _process_state_dict_for_model_glu_interleaving(state, routed, shared)
    for name, size in ((DENSE, routed), (ROUTED, routed), (SHARED, shared), ("other.weight", None)):
        assert torch.equal(changed[name], _interleave_glu_tensor(state[name], size) if size else state[name])
    back = _process_state_dict_for_model_glu_interleaving(changed, routed, shared, interleave=False)
    assert back.keys() == state.keys()
    assert back["step"] == 7
    assert all(torch.equal(back[name], state[name]) for name in state if name != "step")


def test_the_sizes_are_those_of_the_model_and_make_converters() -> None:
    part = SimpleNamespace(config=SimpleNamespace(moe_mlp_glu_interleave_size=4))
    run = SimpleNamespace(model=SimpleNamespace(moe_shared_expert_glu_interleave_size=2))
    assert _get_model_glu_interleave_sizes([SimpleNamespace(), part], run) == (4, 2)
    assert _get_model_glu_interleave_sizes([SimpleNamespace()]) == (None, None)
    assert glu_converters([SimpleNamespace()]) == []
    state = {name: torch.randn(32, 3) for name in (DENSE, ROUTED, SHARED)}
    transforms = StateDictTransforms(converters=glu_converters([part], run))
    interleaved = _process_state_dict_for_model_glu_interleaving(state, 4, 2)
    assert all(torch.equal(transforms.to_storage(interleaved)[name], state[name]) for name in state)
    assert all(torch.equal(transforms.from_storage(state)[name], interleaved[name]) for name in state)


def test_several_experts_in_one_tensor_and_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"experts\.linear_fc1\.weight: .*\(4, 32, 3\) holds several"):
        _process_state_dict_for_glu_interleaving({ROUTED: torch.zeros(4, 32, 3)}, 4)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.linear_fc1\.weight: .*which 5 does not divide"):
        _process_state_dict_for_glu_interleaving({DENSE: torch.zeros(32, 3)}, 5)


def interleave_a_dtensor() -> bool:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(96.0).reshape(32, 3)
    spread = distribute_tensor(whole, mesh, [Shard(0)])
    changed = _process_state_dict_for_glu_interleaving({DENSE: spread}, 4)[DENSE]
    back = _process_state_dict_for_glu_interleaving({DENSE: changed}, 4, interleave=False)[DENSE]
    expected = _interleave_glu_tensor(whole, 4)
    kept = changed.placements == spread.placements and back.placements == spread.placements
    return kept and torch.equal(changed.full_tensor(), expected) and torch.equal(back.full_tensor(), whole)


def test_a_dtensor_is_interleaved_and_stays_one(gloo: Gloo) -> None:
    assert gloo.run_ok(interleave_a_dtensor) == [True, True]
