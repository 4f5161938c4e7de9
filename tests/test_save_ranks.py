"""Saving from several ranks: any number writes what any number reads, and all succeed or none."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.checkpoints import files_in
from support.gloo import RankFailure
from support.tiny import heterogeneous_checkpoint, tensors_of, tiny_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM

from patchers import deci_x_patcher
from sharded_ckpt.checkpoint.storage import LocalStorage
from sharded_ckpt.loading.verbs import load_and_shard_model, load_sharded_state_dict
from sharded_ckpt.runtime import default_runtime
from sharded_ckpt.saving.verbs import save_sharded_checkpoint, save_sharded_model

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


class Heard(logging.Handler):
    """What a rank logged as a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("sharded_ckpt").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
        for name, tensor in found.items()
    )


def refusals(results: list[Any]) -> list[RankFailure]:
    assert all(isinstance(result, RankFailure) for result in results), results
    assert len({(result.type, result.text) for result in results}) == 1
    return results


# Any number of ranks ---------------------------------------------------------------------------------------


def save_on_some_load_on_others(parent: str, out: str) -> list[str]:
    """On four ranks: save from the first 1, 2, 3 and 4 of them, load each on the first 1, 2, 3 and 4."""
    rank, expected, wrong = dist.get_rank(), tensors_of(Path(parent)), []
    groups = {n: dist.new_group(list(range(n))) for n in range(1, 5)}
    runtimes = {n: default_runtime(process_group=groups[n]) for n in groups if rank < n}
    for n, runtime in runtimes.items():
        shard = load_and_shard_model("auto", parent, runtime=runtime)
        save_sharded_checkpoint(shard, f"{out}/from-{n}", runtime=runtime, durable=False)
        if not same(tensors_of(Path(f"{out}/from-{n}")), expected):
            wrong.append(f"the files from {n} ranks differ")
    dist.barrier()
    for n in groups:
        for m, runtime in runtimes.items():
            state = dict(load_and_shard_model("auto", f"{out}/from-{n}", runtime=runtime).state_dict())
            if HEAD in state and HEAD not in expected:  # tied: both ends are the embedding
                state[EMBEDDING] = state.pop(HEAD)
            if not same(state, {name: expected[name] for name in state}):
                wrong.append(f"a shard on {m} ranks differs from the files of {n}")
    dist.barrier()
    return wrong


def parent_of(shared: Path, kind: str, family: str, tied: bool, dtype: torch.dtype) -> Path:
    make = {"homogeneous": tiny_checkpoint, "heterogeneous": heterogeneous_checkpoint}[kind]
    return make(shared, family, tied=tied, dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "family", "tied", "dtype"),
    [
        ("heterogeneous", "qwen3", True, torch.bfloat16),
        ("heterogeneous", "llama", False, torch.float32),
        ("homogeneous", "llama", False, torch.float32),
        ("homogeneous", "qwen3", True, torch.bfloat16),
    ],
)
def test_any_number_of_ranks_reads_what_any_number_wrote(gloo, shared, tmp_path, kind, family, tied, dtype):
    parent = parent_of(shared, kind, family, tied, dtype)
    results = gloo.run_ok(save_on_some_load_on_others, str(parent), str(tmp_path), world_size=4)
    assert results == [[]] * 4
    expected = tensors_of(parent)
    for n in range(1, 5):
        saved = tmp_path / f"from-{n}"
        shards = [f"model-0000{rank}-of-0000{n}.safetensors" for rank in range(1, n + 1)]
        assert sorted(path.name for path in saved.glob("*.safetensors")) == shards
        assert (saved / "config.json").read_text() == (tmp_path / "from-1" / "config.json").read_text()
        with deci_x_patcher(family) if kind == "heterogeneous" else nullcontext():
            opened = AutoModelForCausalLM.from_pretrained(saved).state_dict()
        assert same({name: opened[name] for name in expected}, expected)
    assert json.loads((saved / "config.json").read_text()) == json.loads((parent / "config.json").read_text())


# Numbering -------------------------------------------------------------------------------------------------


def save_blocks(parent: str, out: str, owned: list[list[int]], limit: int | None = None) -> None:
    shard = load_and_shard_model("auto", parent, owned[dist.get_rank()])
    save_sharded_model(shard, f"{out}/model.safetensors", max_shard_size=limit)


def test_a_rank_that_owns_nothing_writes_no_file_and_the_numbers_have_no_gap(gloo, shared, tmp_path):
    parent = tiny_checkpoint(shared)
    gloo.run_ok(save_blocks, str(parent), str(tmp_path), [[0, 3], [], [1, 2]], world_size=3)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert files_in(tmp_path) == [*shards, INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    expected = tensors_of(parent)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert index["weight_map"][HEAD] == shards[0]
    assert index["weight_map"]["model.layers.1.mlp.up_proj.weight"] == shards[1]
    assert same(load_sharded_state_dict(tmp_path), expected)


def test_several_files_a_rank_are_numbered_in_the_order_of_ranks(gloo, shared, tmp_path):
    parent = tiny_checkpoint(shared)
    gloo.run_ok(save_blocks, str(parent), str(tmp_path), [[0, 1], [2, 3]], 120_000, world_size=2)
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    files = sorted(set(index.values()))
    count = len(files)
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert count > 3
    assert max(v for k, v in index.items() if "layers.1." in k) < min(
        v for k, v in index.items() if "layers.2." in k
    )
    assert same(tensors_of(tmp_path), tensors_of(parent))


# Dicts -----------------------------------------------------------------------------------------------------


def save_dicts(out: str, values: list[dict[str, float]]) -> None:
    mine = {name: torch.full((3,), value) for name, value in values[dist.get_rank()].items()}
    save_sharded_model(mine, f"{out}/model.safetensors")


def test_dicts_on_many_ranks_are_united_and_what_is_equal_is_written_once_by_the_lowest(gloo, tmp_path):
    values = [{"a": 1.0}, {"b": 2.0, "shared": 5.0}, {"shared": 5.0, "c": 3.0}]
    gloo.run_ok(save_dicts, str(tmp_path), values, world_size=3)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * 3 * 4
    assert index["weight_map"] == {
        "a": "model-00001-of-00003.safetensors",
        "b": "model-00002-of-00003.safetensors",
        "c": "model-00003-of-00003.safetensors",
        "shared": "model-00002-of-00003.safetensors",
    }


def test_a_tensor_that_differs_between_ranks_is_refused_with_its_name_and_the_ranks(gloo, tmp_path):
    values = [{"a": 1.0, "layers.0.w": 0.0}, {"b": 2.0}, {"layers.0.w": -0.0, "a": 1.0}]
    for failure in refusals(gloo.run(save_dicts, str(tmp_path), values, world_size=3)):
        assert failure.type == "CollectiveError"
        assert (
            "ranks have tensors of one name that are not the same: layers.0.w: different values on rank "
            in (failure.text)
        )
        assert "on rank 0,2" in failure.text
    assert files_in(tmp_path) == []


def save_shapes(out: str) -> None:
    mine = {"w": torch.zeros(2, 3, dtype=[torch.float32, torch.bfloat16][dist.get_rank()])}
    save_sharded_model(mine, f"{out}/model.safetensors")


def test_a_tensor_whose_dtype_differs_between_ranks_is_refused_with_both(gloo, tmp_path):
    for failure in refusals(gloo.run(save_shapes, str(tmp_path), world_size=2)):
        assert "w: F32 (2, 3) on rank 0, BF16 (2, 3) on rank 1" in failure.text


# Families --------------------------------------------------------------------------------------------------


def save_all(parents: list[str], out: str) -> None:
    for number, parent in enumerate(parents):
        save_blocks(parent, f"{out}/{number}", [[1, 2], [0, 3]])


def test_families_with_other_names_in_their_files_are_saved_in_those_from_several_ranks(
    gloo, shared, tmp_path
):
    sizes = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
    experts = {"num_experts": 4, "num_local_experts": 4, **sizes}
    families = ("mixtral", "qwen3_moe", "gpt_oss", "phimoe")
    parents = [tiny_checkpoint(shared, family, shards=1, **experts) for family in families]
    parents += [tiny_checkpoint(shared, family) for family in ("gpt2", "phi3")]
    gloo.run_ok(save_all, [str(parent) for parent in parents], str(tmp_path))
    for number, parent in enumerate(parents):
        assert same(tensors_of(tmp_path / str(number)), tensors_of(parent)), parent


# Ties ------------------------------------------------------------------------------------------------------


def save_ends(parent: str, out: str, grown: float) -> tuple[list[str], bool]:
    heard = Heard()
    shard = load_and_shard_model("auto", parent)
    if dist.get_rank() == 1:
        shard.lm_head.weight = nn.Parameter(shard.lm_head.weight.detach() + grown)
    save_sharded_checkpoint(shard, out)
    return heard.texts, shard.config.tie_word_embeddings


def test_equal_ends_on_two_ranks_are_written_once(gloo, shared, tmp_path):
    parent = tiny_checkpoint(shared, tied=True)
    assert gloo.run_ok(save_ends, str(parent), str(tmp_path / "c"), 0.0) == [([], True)] * 2
    assert same(tensors_of(tmp_path / "c"), tensors_of(parent))
    assert json.loads((tmp_path / "c" / "config.json").read_text())["tie_word_embeddings"] is True


def test_diverged_ends_on_two_ranks_are_both_written_and_the_config_tells_the_truth(gloo, shared, tmp_path):
    parent = tiny_checkpoint(shared, tied=True)
    (texts, tied), other = gloo.run_ok(save_ends, str(parent), str(tmp_path / "c"), 1.0)
    assert (len(texts), tied, other) == (1, True, ([], True))  # one warning, live configs untouched
    assert (
        "lm_head.weight and model.embed_tokens.weight are tied by the config, but hold different" in texts[0]
    )
    expected = tensors_of(parent)
    expected[HEAD] = expected[EMBEDDING] + 1.0
    assert same(tensors_of(tmp_path / "c"), expected)
    assert json.loads((tmp_path / "c" / "config.json").read_text())["tie_word_embeddings"] is False
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "c").state_dict()
    assert same(dict(opened), expected)
    assert same(dict(load_and_shard_model("auto", tmp_path / "c").state_dict()), expected)


# Failures --------------------------------------------------------------------------------------------------


def save_with_a_fault(parent: str, out: str, fault: str) -> None:
    rank = dist.get_rank()
    shard = load_and_shard_model("auto", parent)
    with torch.no_grad():
        for parameter in shard.parameters():
            parameter.add_(1.0)
    if fault == "meta" and rank == 1:
        shard.to("meta")
    elif fault == "disk" and rank == 2:
        LocalStorage.write = _full  # type: ignore[method-assign]
    elif fault == "config" and rank == 0:
        shard.config.block_configs[0]["ffn"]["intermediate_size"] = 64
    elif fault == "field" and rank == 1:
        shard.config.rms_norm_eps = 1e-3
    elif fault == "argument":
        out = [out, out, f"{out}/model.safetensors"][rank]
    save_sharded_checkpoint(shard, out, max_shard_size=1000 * rank if fault == "size" else None)


def _full(self: LocalStorage, *args: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("meta", ["failed on rank 1 of 3: CheckpointError: ", "on the meta device, without values"]),
        ("disk", ["failed on rank 2 of 3: OSError: ", "No space left on device", "nothing was published"]),
        ("config", ["the ranks disagree on `block_configs` (ranks 0 and 1-2)", "alike on all"]),
        ("field", ["the ranks disagree on `rms_norm_eps` (ranks 0,2 and 1)"]),
        (
            "argument",
            ["failed on rank 2 of 3: ConfigError: ", "expected a directory, found the name of a file"],
        ),
        ("size", ["the ranks disagree on `plan`: {'max_shard_size': 0} on rank 0; {'max_shard_size': 1000}"]),
    ],
)
def test_when_any_rank_fails_all_raise_and_name_it_and_the_old_checkpoint_stays(
    gloo, shared, tmp_path, fault, parts
):
    old = heterogeneous_checkpoint(tmp_path)
    before = {name: (old / name).read_bytes() for name in files_in(old)}
    parent = str(heterogeneous_checkpoint(shared))
    results = gloo.run(save_with_a_fault, parent, str(old), fault, world_size=3)
    assert all(part in failure.text for part in parts for failure in refusals(results))
    assert {name: (old / name).read_bytes() for name in files_in(old)} == before
    assert files_in(tmp_path) == [f"{old.name}/{name}" for name in before]


def test_what_no_rank_owns_is_named_on_all_ranks(gloo, shared, tmp_path):
    results = gloo.run(save_blocks, str(tiny_checkpoint(shared)), str(tmp_path / "c"), [[0, 1], [3]])
    for failure in refusals(results):
        assert "no rank owns model.layers.2: the checkpoint would not be whole" in failure.text
    assert not (tmp_path / "c").exists()
