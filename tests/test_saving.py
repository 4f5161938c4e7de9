"""Saving from one process: what is written, under which names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import files_in
from support.compare import assert_same_tensors
from support.tiny import tensors_of, tiny_checkpoint, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from patchers.errors import CheckpointError, ConfigError, MissingKeysError
from sharded_ckpt.checkpoint.writer import DTYPE_NAMES
from sharded_ckpt.loading.verbs import load_and_shard_model, load_sharded_state_dict
from sharded_ckpt.saving.verbs import save_sharded_checkpoint, save_sharded_model

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


def diverged(model: Any) -> Any:
    """The same model, with a head that is no longer the embedding, though the config says so."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    return model


def bits(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # a single element may have any stride


def assert_same_dict(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(bits(tensor), bits(expected[name])), name


# Names and files -------------------------------------------------------------------------------------------


def test_one_rank_writes_a_numbered_shard_and_an_index_with_the_true_size(tmp_path):
    tensors = {"a": torch.ones(3, 5), "b.c": torch.ones(7, dtype=torch.bfloat16)}
    save_sharded_model(tensors, tmp_path / "new" / "model.safetensors")
    assert files_in(tmp_path / "new") == ["model-00001-of-00001.safetensors", INDEX]
    index = index_of(tmp_path / "new")
    assert index["metadata"]["total_size"] == 3 * 5 * 4 + 7 * 2
    assert index["weight_map"] == dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    assert_same_dict(load_file(tmp_path / "new" / "model-00001-of-00001.safetensors"), tensors)


def test_max_shard_size_makes_several_files_of_one_rank(tmp_path):
    tensors = {f"layers.{i}.weight": torch.full((16,), float(i)) for i in range(5)}
    save_sharded_model(tensors, tmp_path / "model.safetensors", max_shard_size=128)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert files_in(tmp_path) == [*names, INDEX]
    assert_same_dict(tensors_of(tmp_path), tensors)


def test_the_stem_is_the_users(tmp_path):
    save_sharded_model({"a": torch.ones(1)}, tmp_path / "adapter.safetensors")
    assert files_in(tmp_path) == [
        "adapter-00001-of-00001.safetensors",
        "adapter.safetensors.index.json",
    ]


def test_a_stale_single_file_and_older_shards_go_and_other_files_stay(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"old")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / INDEX).write_text('{"metadata": {}, "weight_map": {}}')
    (tmp_path / "tokenizer.json").write_text("kept")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README").write_text("kept")
    save_sharded_model({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert files_in(tmp_path) == ["model-00001-of-00001.safetensors", INDEX, "notes/README", "tokenizer.json"]
    assert_same_dict(load_sharded_state_dict(tmp_path), {"a": torch.ones(2)})


def test_saving_over_the_checkpoint_that_is_mapped_leaves_the_mapped_model_as_it_was(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    before = tensors_of(folder)
    model = load_and_shard_model("auto", folder)
    changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_sharded_model(changed, folder / "model.safetensors")
    assert_same_dict(dict(model.state_dict()), before)
    assert_same_dict(tensors_of(folder), changed)


def test_a_single_file_beside_an_index_is_refused_by_a_load_and_removed_by_a_save(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    model = load_and_shard_model("auto", folder, materialize=True)
    save_file({name: tensor + 1 for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_and_shard_model("auto", folder)
    save_sharded_model(model, folder / "model.safetensors")
    assert not (folder / "model.safetensors").exists()
    assert_same_tensors(load_and_shard_model("auto", folder), model)


def test_a_manifest_is_written_where_asked_for_and_nothing_is_overwritten_where_forbidden(tmp_path):
    save_sharded_model({"a": torch.ones(2)}, tmp_path / "c" / "model.safetensors", manifest=True)
    listed = json.loads((tmp_path / "c" / "manifest.json").read_text())["files"]
    assert set(listed) == {"model-00001-of-00001.safetensors", INDEX}
    with pytest.raises(CheckpointError, match="overwrite=True"):
        save_sharded_model({"a": torch.ones(2)}, tmp_path / "c" / "model.safetensors", overwrite=False)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("", "expected the name of a .safetensors file, found a directory"),
        ("model.bin", "found a file that ends in '.bin'; pass <directory>/model.safetensors"),
        ("model", "found a file that ends in ''; pass <directory>/model.safetensors"),
        (INDEX, "found a file that ends in '.json'"),
        (
            "model-00001-of-00002.safetensors",
            "shards get their numbers by themselves; pass",
        ),
    ],
)
def test_other_names_are_refused_with_what_to_pass(tmp_path, path, text):
    with pytest.raises(ConfigError) as raised:
        save_sharded_model({"a": torch.ones(1)}, tmp_path / path)
    assert text in str(raised.value)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("save", "name"), [(save_sharded_model, "/model.safetensors"), (save_sharded_checkpoint, "")]
)
def test_a_url_is_refused_before_anything_is_compared(tmp_path, monkeypatch, save, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"s3://bucket/run.*: expected a local path, found a URL"):
        save({"a": torch.ones(1)}, f"s3://bucket/run{name}")
    assert files_in(tmp_path) == []


def test_a_directory_named_like_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ConfigError, match="found a directory"):
        save_sharded_model({"a": torch.ones(1)}, tmp_path / "model.safetensors")


def test_arguments_of_another_type_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"out_path is a path, found int; pass <directory>/model\.safe"):
        save_sharded_model({"a": torch.ones(1)}, 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a module or a dict of tensors by name, found list; pass"):
        save_sharded_model([torch.ones(1)], tmp_path / "model.safetensors")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="step: a int, not a tensor"):
        save_sharded_model({"step": 3}, tmp_path / "model.safetensors")  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="checkpoint_dir is a path, found NoneType"):
        save_sharded_checkpoint(tiny_model(), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"a directory, found the name of a file; pass {tmp_path},"):
        save_sharded_checkpoint(tiny_model(), tmp_path / "model.safetensors")
    assert files_in(tmp_path) == []


def test_nothing_to_save_is_an_error(tmp_path):
    with pytest.raises(MissingKeysError, match="there is nothing to save: no rank has a tensor"):
        save_sharded_model({}, tmp_path / "model.safetensors")


# Tensors ---------------------------------------------------------------------------------------------------


def test_every_dtype_comes_back_bit_by_bit(tmp_path):
    raw = torch.arange(64, dtype=torch.uint8)
    dtypes = [getattr(torch, name.removeprefix("torch.")) for name in DTYPE_NAMES]
    tensors = {str(dtype): raw.clone().view(dtype) for dtype in dtypes if dtype is not torch.bool}
    tensors["flag"] = raw % 2 == 0
    save_sharded_model(tensors, tmp_path / "model.safetensors")
    known = {name: tensor for name, tensor in tensors.items() if "float4" not in name}
    assert_same_dict(load_sharded_state_dict(tmp_path, known), known)
    assert len(known) == len(DTYPE_NAMES) - 1


def test_shared_views_and_strange_strides_are_written_with_their_own_values(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": base,
        "again": base,
        "row": base[1],
        "columns": base[:, ::2],
        "turned": base.T,
        "spread": torch.ones(1, 3).expand(2, 3),
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "negated": torch.tensor([1 + 2j]).conj().imag,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(5, dtype=torch.int16),
        "trained": nn.Parameter(torch.ones(2)),
    }
    save_sharded_model(tensors, tmp_path / "model.safetensors")
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    assert_same_dict(load_sharded_state_dict(tmp_path), detached)


def test_tensors_without_values_are_refused_by_name_and_nothing_is_published(tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.to("meta")
    model.model.layers[2].mlp.to("meta")
    with pytest.raises(CheckpointError) as raised:
        save_sharded_model(model, tmp_path / "model.safetensors")
    assert "model.layers.{1-2}.mlp.up_proj.weight" in str(raised.value)
    assert "on the meta device, without values: load or initialise it first" in str(raised.value)
    assert files_in(tmp_path) == []


def test_only_persistent_buffers_are_saved(tmp_path):
    module = nn.BatchNorm1d(3)
    module.register_buffer("cache", torch.zeros(9), persistent=False)
    save_sharded_model(module, tmp_path / "model.safetensors")
    saved = tensors_of(tmp_path)
    assert set(saved) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert saved["num_batches_tracked"].shape == ()


def test_names_lose_what_wrappers_put_into_them(tmp_path):
    model = tiny_model(layers=2)
    plain = dict(model.state_dict())
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    save_sharded_model(torch.compile(model, backend="eager"), tmp_path / "a" / "model.safetensors")
    assert_same_dict(tensors_of(tmp_path / "a"), plain)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in plain.items()}
    save_sharded_model(wrapped, tmp_path / "b" / "model.safetensors")
    assert_same_dict(tensors_of(tmp_path / "b"), plain)


def test_two_keys_of_one_name_are_refused(tmp_path):
    twice = {"module.a.weight": torch.ones(1), "a.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"several tensors of one name: a\.weight, module\.a\.weight"):
        save_sharded_model(twice, tmp_path / "model.safetensors")


# Ties ------------------------------------------------------------------------------------------------------


def test_a_tied_head_is_left_out_as_hugging_face_leaves_it_out(tmp_path):
    model = tiny_model(tied=True)
    save_sharded_checkpoint(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert_same_dict(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs"))
    assert HEAD not in index_of(tmp_path / "ours")["weight_map"]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert_same_tensors(opened, model)


def test_a_head_that_only_equals_the_embedding_is_left_out_too(tmp_path):
    model = tiny_model(tied=True)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    save_sharded_model(model, tmp_path / "model.safetensors")
    assert HEAD not in tensors_of(tmp_path)


def test_bits_decide_whether_ends_are_equal_not_numbers(tmp_path, caplog):
    model = tiny_model(tied=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = 0.0
    head = model.model.embed_tokens.weight.detach().clone()
    head[0, 0] = -0.0
    model.lm_head.weight = nn.Parameter(head)
    save_sharded_model(model, tmp_path / "model.safetensors")
    assert torch.signbit(tensors_of(tmp_path)[HEAD][0, 0])
    assert "hold different values" in caplog.text


def test_diverged_ends_are_both_written_and_the_config_tells_the_truth(tmp_path, caplog):
    model = diverged(tiny_model(tied=True))
    save_sharded_checkpoint(model, tmp_path / "c")
    assert json.loads((tmp_path / "c" / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.config.tie_word_embeddings is True
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'c'}: lm_head.weight and model.embed_tokens.weight are tied by the config, but hold "
        "different values: both were written, and config.json says tie_word_embeddings: false"
    ]
    for opened in (
        load_and_shard_model("auto", tmp_path / "c"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "c"),
    ):
        assert_same_tensors(opened, model)


def test_diverged_ends_beside_a_config_that_calls_them_tied_are_kept_apart_by_every_reader(tmp_path, caplog):
    folder = tiny_checkpoint(tmp_path, tied=True)
    model = diverged(load_and_shard_model("auto", folder))
    save_sharded_model(model, folder / "model.safetensors")
    assert "config.json beside them should say tie_word_embeddings: false" in caplog.text
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    with torch.no_grad():
        assert_same_tensors(load_and_shard_model("auto", folder), model)
        assert_same_tensors(AutoModelForCausalLM.from_pretrained(folder), model)


def test_ends_that_share_memory_but_are_not_tied_by_the_config_are_both_written(tmp_path):
    model = tiny_model(tied=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    save_sharded_checkpoint(model, tmp_path / "c")
    assert {HEAD, EMBEDDING} <= set(index_of(tmp_path / "c")["weight_map"])
    assert_same_tensors(load_and_shard_model("auto", tmp_path / "c"), model)


def test_a_dict_is_written_as_it_is(tmp_path):
    state = tiny_model(tied=True).state_dict()
    save_sharded_model(state, tmp_path / "model.safetensors")
    assert_same_dict(tensors_of(tmp_path), dict(state))


# Parts -----------------------------------------------------------------------------------------------------


def test_a_part_of_a_model_is_not_saved_as_if_it_were_whole(tmp_path):
    shard = load_and_shard_model("auto", tiny_checkpoint(tmp_path), {0, 1})
    with pytest.raises(MissingKeysError) as raised:
        save_sharded_model(shard, tmp_path / "out" / "model.safetensors")
    assert "no rank owns lm_head, model.layers.{2-3}, model.norm" in str(raised.value)
    assert "to write a part of it on purpose, pass its state_dict()" in str(raised.value)
    assert not (tmp_path / "out").exists()
    save_sharded_model(shard.state_dict(), tmp_path / "out" / "model.safetensors")
    assert_same_dict(tensors_of(tmp_path / "out"), dict(shard.state_dict()))


def test_adapters_and_quantised_models_are_refused_with_what_to_do(tmp_path):
    model = tiny_model()
    model._hf_peft_config_loaded = True
    with pytest.raises(ConfigError, match=r"holds adapters .*: merge them \(merge_and_unload"):
        save_sharded_model(model, tmp_path / "model.safetensors")
    model = tiny_model()
    model.hf_quantizer = object()
    with pytest.raises(ConfigError, match=r"quantised, .* pass model\.state_dict\(\) to save_sharded_model"):
        save_sharded_model(model, tmp_path / "model.safetensors")


def test_a_family_with_other_names_in_its_files_is_saved_in_those(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path, "mixtral", num_local_experts=2))
    model.save_pretrained(tmp_path / "theirs")
    save_sharded_checkpoint(model, tmp_path / "ours")
    assert_same_dict(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs"))
    assert not any("gate_up_proj" in name for name in index_of(tmp_path / "ours")["weight_map"])
    assert_same_tensors(load_and_shard_model("auto", tmp_path / "ours"), model)
