"""A loaded shard equals what plain `from_pretrained` gives, and holds nothing else."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compare import assert_same_tensors, storage_of_stubs, tensors_in
from support.families import family_model
from support.gloo import Gloo
from support.tiny import FAMILIES, heterogeneous_checkpoint, tensors_of, tiny_checkpoint, write_shards
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from patchers import AttentionConfig, BlockConfig, FFNConfig, ModelDescriptor, deci_x_patcher
from patchers.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    MissingKeysError,
    OwnershipError,
)
from sharded_ckpt import Runtime, is_in_safetensors_format, load_and_shard_model, load_sharded_state_dict
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.loading.opening import open_loader
from sharded_ckpt.loading.options import LoadOptions
from sharded_ckpt.runtime import default_runtime

ROUTES = ("direct", "converted")
OWNED = [{0, 1, 2, 3}, {0}, {1, 2}, {3}, {0, 3}, {0, 2}, set()]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_from_pretrained(
    shared: Path, family: str, tied: bool, dtype: torch.dtype, route: Any
) -> None:
    folder = tiny_checkpoint(shared, family, tied=tied, dtype=dtype)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    for owned in OWNED:
        model = load_and_shard_model("auto", folder, owned, route=route)
        assert type(model) is type(reference)
        assert_same_tensors(model, reference, partial=len(owned) < 4)
        assert storage_of_stubs(model) == 0
        assert model.config.to_dict() == reference.config.to_dict()
        assert model.generation_config.to_dict() == reference.generation_config.to_dict()
        assert model.name_or_path == reference.name_or_path
        assert not model.training
        assert {p.requires_grad for p in model.parameters()} <= {True}
        assert _blocks_in(model) == owned
        assert ("model.embed_tokens.weight" in tensors_in(model)) == (0 in owned)
        assert ("lm_head.weight" in tensors_in(model)) == (3 in owned)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("asked", [torch.float32, torch.float16])
def test_dtype_is_cast_only_when_asked_and_reported(shared: Path, route: Any, asked: torch.dtype) -> None:
    folder = tiny_checkpoint(shared, dtype=torch.bfloat16)
    model = load_and_shard_model("llama", folder, dtype=asked, route=route)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=asked)
    assert_same_tensors(model, reference)
    assert model.config.to_dict() == reference.config.to_dict()
    assert [len(names) for names in model.load_report.cast.values()] == [39]
    assert model.load_report


def test_whole_model_ties_what_the_config_ties(shared: Path) -> None:
    for route in ROUTES:
        model = load_and_shard_model("auto", tiny_checkpoint(shared, tied=True), route=route)
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("route", ROUTES)
def test_tie_weights_cannot_empty_the_head_of_a_last_shard(shared: Path, route: Any) -> None:
    model = load_and_shard_model("auto", tiny_checkpoint(shared, tied=True), {3}, route=route)
    before = model.lm_head.weight.clone()
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("route", ROUTES)
def test_both_keys_of_a_tied_pair_are_tied_if_equal(tmp_path: Path, route: Any) -> None:
    folder = shutil.copytree(tiny_checkpoint(tmp_path, tied=True, shards=1), tmp_path / "both")
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_and_shard_model("auto", folder, route=route)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors["lm_head.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_and_shard_model("auto", folder, route=route)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    assert model.load_report.untied == ("lm_head.weight",)
    assert torch.equal(
        load_and_shard_model("auto", folder, {3}, route=route).lm_head.weight, tensors["lm_head.weight"]
    )


@pytest.mark.parametrize("route", ROUTES)
def test_head_alone_feeds_a_tied_embedding(tmp_path: Path, route: Any) -> None:
    folder = shutil.copytree(tiny_checkpoint(tmp_path, tied=True, shards=1), tmp_path / "head")
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(folder)
    for owned in OWNED:
        model = load_and_shard_model("auto", folder, owned, route=route)
        assert_same_tensors(model, reference, partial=len(owned) < 4)


@pytest.mark.parametrize("dialect", ["anymodel", "nemotron_nas"])
@pytest.mark.parametrize("tied", [False, True])
def test_heterogeneous_shards_hold_exactly_their_tensors(shared: Path, dialect: Any, tied: bool) -> None:
    folder = heterogeneous_checkpoint(shared, dialect=dialect, tied=tied)
    saved = tensors_of(folder)
    for owned, route in itertools.product([{0, 1, 2}, {3, 4}, {5}, {6}], ROUTES):
        state = load_and_shard_model("auto", folder, owned, route=route).state_dict()
        expected = {
            k: v for k, v in saved.items() if k.startswith("model.layers.") and int(k.split(".")[2]) in owned
        }
        if 0 in owned:
            expected["model.embed_tokens.weight"] = saved["model.embed_tokens.weight"]
        if 6 in owned:
            head = "model.embed_tokens.weight" if tied else "lm_head.weight"
            expected |= {"model.norm.weight": saved["model.norm.weight"], "lm_head.weight": saved[head]}
        assert set(state) == set(expected)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_heterogeneous_model_equals_auto_class_inside_the_patcher(shared: Path, family: str) -> None:
    folder = heterogeneous_checkpoint(shared, family)
    with deci_x_patcher(family):
        reference = AutoModelForCausalLM.from_pretrained(folder)
    model = load_and_shard_model(family, folder)
    assert_same_tensors(model, reference)
    assert model.config.to_dict() == reference.config.to_dict()


def test_zero_copy_by_default_and_a_copy_when_asked(shared: Path) -> None:
    folder = tiny_checkpoint(shared, shards=1)
    mapped = load_and_shard_model("auto", folder)
    owned = load_and_shard_model("auto", folder, materialize=True)
    assert_same_tensors(owned, mapped)
    file = str(folder / "model.safetensors")
    assert {_file_behind(tensor) for tensor in mapped.parameters()} == {file}
    assert file not in {_file_behind(tensor) for tensor in owned.parameters()}
    with torch.no_grad():
        mapped.model.norm.weight.add_(1)
    assert torch.equal(load_and_shard_model("auto", folder).model.norm.weight, owned.model.norm.weight)


def test_attention_implementation_is_as_asked(shared: Path) -> None:
    for route in ROUTES:
        model = load_and_shard_model(
            "auto", tiny_checkpoint(shared), attn_implementation="eager", route=route
        )
        assert model.config._attn_implementation == "eager"
        assert model.model.layers[0].self_attn.config._attn_implementation == "eager"


def test_config_argument_replaces_the_files(shared: Path) -> None:
    folder = heterogeneous_checkpoint(shared)
    config = AutoConfig.from_pretrained(folder)
    before = config.to_dict()
    bare = shutil.copytree(folder, shared / "bare", dirs_exist_ok=True)
    (bare / "config.json").unlink()
    assert_same_tensors(
        load_and_shard_model("llama", bare, model_config=config), load_and_shard_model("llama", folder)
    )
    assert config.to_dict() == before
    with pytest.raises(CheckpointNotFoundError, match=r"no config\.json.*pass model_config"):
        load_and_shard_model("llama", bare)


def test_block_configs_argument_replaces_the_config(shared: Path) -> None:
    folder = tiny_checkpoint(shared)
    blocks = [
        BlockConfig(),
        BlockConfig(AttentionConfig(no_op=True)),
        BlockConfig(ffn=FFNConfig(no_op=True)),
        BlockConfig(),
    ]
    with pytest.raises(CheckpointError, match=r"6 tensors|7 tensors|9 tensors") as raised:
        load_and_shard_model("llama", folder, block_configs=blocks)
    assert "pass strict=False" in str(raised.value)
    assert "model.layers.1.self_attn.q_proj.weight" in str(raised.value)
    model = load_and_shard_model("llama", folder, block_configs=blocks, strict=False)
    assert not model.load_report
    assert len(model.load_report.unexpected) == 5 + 4
    assert "model.layers.2.mlp.up_proj.weight" in model.load_report.unexpected


def test_report_says_what_was_done(shared: Path) -> None:
    model = load_and_shard_model("auto", tiny_checkpoint(shared, tied=True), {0, 1})
    report = model.load_report
    assert report.blocks == (0, 1)
    assert report.num_blocks == 4
    assert report.tensors == 19
    assert report.nbytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert str(report).startswith(f"{tiny_checkpoint(shared, tied=True)}: blocks 0-1 of 4, 19 tensors, ")
    assert report.route == "direct"


def test_report_warns_once_when_config_and_files_disagree(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(tiny_checkpoint(tmp_path), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    with caplog.at_level(logging.WARNING):
        model = load_and_shard_model("auto", folder)
    assert_same_tensors(model, AutoModelForCausalLM.from_pretrained(folder))
    assert "cast float32 -> bfloat16 (the config says so, the files do not): 39 tensors" in caplog.text


def test_dtype_comes_from_the_files_when_the_config_is_silent(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint(tmp_path, dtype=torch.bfloat16), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_tensors(load_and_shard_model("auto", folder), AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("route", ROUTES)
def test_generation_settings_come_out_of_an_old_config_too(tmp_path: Path, route: Any) -> None:
    folder = shutil.copytree(tiny_checkpoint(tmp_path), tmp_path / "old")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [5, 6], "temperature": 0.5}))
    model, reference = (
        load_and_shard_model("auto", folder, route=route),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    assert model.config.to_dict() == reference.config.to_dict()


def save_version(parent: Path, folder: Path, version: int) -> None:
    """Save what a tiny checkpoint has, with a version in the weights and in both configs."""
    config, tensors = json.loads((parent / "config.json").read_text()), tensors_of(parent)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], version)
    with transaction(folder, durable=False) as save:
        save.write_tensors(tensors)
        save.write_json("config.json", {**config, "rms_norm_eps": float(version)})
        save.write_json("generation_config.json", {"eos_token_id": version})


def versions_in(model: Any) -> tuple[float, float, int]:
    return model.model.norm.weight[0].item(), model.config.rms_norm_eps, model.generation_config.eos_token_id


def test_a_save_while_tensors_are_read_takes_nothing_from_the_load(shared: Path, tmp_path: Path) -> None:
    parent, folder = tiny_checkpoint(shared), tmp_path / "ckpt"
    save_version(parent, folder, 3)
    loader = open_loader(folder, {"allow_pickle": False}, LoadOptions(), default_runtime())
    save_version(parent, folder, 4)
    loader.fill()
    assert versions_in(loader.finish()) == (3, 3, 3)
    assert versions_in(load_and_shard_model("auto", folder)) == (4, 4, 4)


def test_a_checkpoint_moved_away_while_the_config_is_read_makes_the_load_begin_again(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, folder = tiny_checkpoint(shared), tmp_path / "ckpt"
    save_version(parent, folder, 3)
    read, news = AutoConfig.from_pretrained, [4, 5]

    def read_after_a_save(*arguments: Any, **options: Any) -> Any:
        if news:
            folder.rename(tmp_path / f"before {news[0]}")
            save_version(parent, folder, news.pop(0))
        return read(*arguments, **options)

    monkeypatch.setattr(AutoConfig, "from_pretrained", read_after_a_save)
    assert versions_in(load_and_shard_model("auto", folder)) == (5, 5, 5)


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", "64"), ("num_hidden_layers", None), ("dtype", "float33")]
)
def test_a_config_that_its_family_does_not_take_is_named(
    shared: Path, tmp_path: Path, field: str, value: Any
) -> None:
    folder = shutil.copytree(tiny_checkpoint(shared), tmp_path / "ckpt")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(
        ConfigError, match=rf"ckpt/config\.json: transformers makes no llama config .*\b{value or field}"
    ):
        load_and_shard_model("auto", folder)


def test_dtype_may_be_a_name(shared: Path) -> None:
    folder = tiny_checkpoint(shared)
    assert load_and_shard_model("auto", folder, dtype="bfloat16").dtype is torch.bfloat16
    assert load_and_shard_model("auto", folder, dtype="auto").dtype is torch.float32


def test_wrappers_prefixes_and_bare_backbones_are_understood(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    reference, saved = load_and_shard_model("auto", folder), tensors_of(folder)
    for number, rename in enumerate(
        (
            lambda n: f"module.{n}",
            lambda n: f"_orig_mod.module.{n}",
            lambda n: n.removeprefix("model."),
            lambda n: f"module.{n.removeprefix('model.')}",
        )
    ):
        renamed = shutil.copytree(folder, tmp_path / f"renamed{number}")
        for file in renamed.glob("model*"):
            file.unlink()
        write_shards(renamed, {rename(name): tensor for name, tensor in saved.items()}, 2)
        assert_same_tensors(load_and_shard_model("auto", renamed), reference)


def test_two_keys_for_one_tensor_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint(tmp_path, shards=1), tmp_path / "copy")
    tensors = tensors_of(folder)
    tensors["module.model.norm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"two keys feed model\.norm\.weight: .*module\.model\.norm\.weight"
    ):
        load_and_shard_model("auto", folder)


def test_legacy_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint(tmp_path, shards=1), tmp_path / "copy")
    tensors = tensors_of(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_and_shard_model("auto", folder)
    assert model.load_report.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    assert model.model.rotary_emb.inv_freq[0] == 1.0
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32


@pytest.mark.parametrize(
    ("family", "saved_once"),
    [
        ("gpt2", "transformer.h.{}.attn.masked_bias"),
        ("gpt_neo", "transformer.h.{}.attn.attention.masked_bias"),
        ("gpt_neo", "transformer.h.{}.attn.attention.bias"),
        ("llava", "vision_tower.vision_model.embeddings.position_ids"),
    ],
)
def test_buffers_that_old_versions_saved_are_ignored(tmp_path: Path, family: str, saved_once: str) -> None:
    settings = {"attention_types": [[["global", "local"], 2]]} if family == "gpt_neo" else {}
    made = family_model(family, **settings)
    made.save_pretrained(tmp_path / "old")
    keys = tuple(dict.fromkeys(saved_once.format(index) for index in range(4)))
    tensors = tensors_of(tmp_path / "old") | {key: torch.ones(3) for key in keys}
    save_file(tensors, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    for owned in ({0, 1, 2, 3}, {1, 2}):
        model = load_and_shard_model("auto", tmp_path / "old", owned)
        assert_same_tensors(model, made, partial=len(owned) < 4)
        assert model.load_report.ignored == keys


def test_quantised_tensors_are_never_cast(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint(tmp_path, shards=1), tmp_path / "copy")
    tensors = tensors_of(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in (torch.float8_e4m3fn, torch.int8):
        save_file(
            {**tensors, name: tensors[name].to(dtype)},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        with pytest.raises(CheckpointError, match=rf"{name} is {dtype}"):
            load_and_shard_model("auto", folder)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"route": "sideways"}, ConfigError, "route is 'auto', 'direct' or 'converted', not 'sideways'"),
        ({"model_config": {}}, ConfigError, "model_config is a transformers config, not dict"),
        ({"owned_block_indexes": {0, 99}}, OwnershipError, "99"),
        ({"owned_block_indexes": {-1}}, OwnershipError, "-1"),
        ({"descriptor": "qwen3"}, ConfigError, "of family 'qwen3', the config of family 'llama'"),
        ({"block_configs": [BlockConfig()] * 3}, ConfigError, "3.*4"),
    ],
)
def test_wrong_arguments_are_refused_by_name(shared: Path, options: Any, error: type, text: str) -> None:
    folder = tiny_checkpoint(shared)
    with pytest.raises(error, match=text):
        load_and_shard_model(**{"descriptor": "llama", "checkpoint_path": folder, **options})


def test_generator_of_blocks_may_be_passed(shared: Path) -> None:
    model = load_and_shard_model("llama", tiny_checkpoint(shared), (i for i in (1, 2)))
    assert _blocks_in(model) == {1, 2}


def test_descriptor_may_be_ones_own(shared: Path) -> None:
    folder = tiny_checkpoint(shared)
    descriptor = ModelDescriptor.from_config(AutoConfig.from_pretrained(folder))
    assert isinstance(load_and_shard_model(descriptor, folder), LlamaForCausalLM)


class OldRuntime:
    """What users of the origin pass: any object with these attributes."""

    device, dtype = torch.device("cpu"), torch.bfloat16
    global_rank, world_size, is_main_process, is_last_process = 0, 1, True, True


def test_any_object_serves_as_runtime(shared: Path) -> None:
    model = load_and_shard_model("llama", tiny_checkpoint(shared), runtime=OldRuntime())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_runtime_without_dtype_leaves_it_to_the_checkpoint(shared: Path) -> None:
    model = load_and_shard_model("llama", tiny_checkpoint(shared), runtime=Runtime(torch.device("cpu")))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_state_dict_by_key(shared: Path) -> None:
    folder = tiny_checkpoint(shared)
    saved = tensors_of(folder)
    assert {k: v.shape for k, v in load_sharded_state_dict(folder).items()} == {
        k: v.shape for k, v in saved.items()
    }
    wanted = ["model.norm.weight", "lm_head.weight", "model.norm.weight"]
    found = load_sharded_state_dict(folder, (key for key in wanted))
    assert set(found) == set(wanted)
    assert all(torch.equal(tensor, saved[key]) for key, tensor in found.items())
    half = load_sharded_state_dict(folder, ["lm_head.weight"], dtype=torch.float16)
    assert torch.equal(half["lm_head.weight"], saved["lm_head.weight"].half())
    assert load_sharded_state_dict(folder, []) == {}


def test_state_dict_refuses_unknown_keys_unless_told(shared: Path) -> None:
    folder = tiny_checkpoint(shared)
    with pytest.raises(MissingKeysError, match=r"model\.layers\.\{7-9\}\.x"):
        load_sharded_state_dict(folder, [f"model.layers.{i}.x" for i in (7, 8, 9)])
    assert set(load_sharded_state_dict(folder, ["lm_head.weight", "nope"], allow_missing=True)) == {
        "lm_head.weight"
    }
    with pytest.raises(TypeError, match="not one string"):
        load_sharded_state_dict(folder, "lm_head.weight")
    with pytest.raises(TypeError, match="keys_to_load has 7; keys are strings"):
        load_sharded_state_dict(folder, ["lm_head.weight", 7])


def test_safetensors_format_is_recognised(shared: Path, tmp_path: Path) -> None:
    assert is_in_safetensors_format(tiny_checkpoint(shared))
    assert is_in_safetensors_format(tiny_checkpoint(shared, shards=1))
    (tmp_path / "pytorch_model.bin").touch()
    assert not is_in_safetensors_format(tmp_path)
    assert not is_in_safetensors_format(tmp_path / "absent")


def test_safetensors_format_is_recognised_wherever_a_load_looks(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(shared)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert is_in_safetensors_format(f"~/{folder.name}")
    assert is_in_safetensors_format(folder.as_uri())
    with pytest.raises(ConfigError, match="expected a local path, found a URL"):
        is_in_safetensors_format("s3://bucket/model")


def _owned_by_rank(folder: str) -> tuple[set[int], int]:
    model = load_and_shard_model("auto", folder)
    return set(model.load_report.blocks), model.load_report.nbytes


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_auto_makes_the_largest_rank_as_small_as_possible(shared: Path, world_size: int, gloo: Gloo) -> None:
    blocks = [(2, 512), (2, 16), (2, 16), (2, 16), (2, 16), ("no_op", "no_op"), (2, 16)]
    folder = heterogeneous_checkpoint(shared, blocks=blocks)
    results = gloo.run_ok(_owned_by_rank, str(folder), world_size=world_size)
    assert sorted(i for owned, _ in results for i in owned) == list(range(7))
    assert 0 in results[0][0]
    assert results[0][0] <= {0, 1}, "the wide block fills the first rank"


def test_more_ranks_than_blocks_leave_some_empty(shared: Path, gloo: Gloo) -> None:
    folder = tiny_checkpoint(shared, layers=2)
    results = gloo.run_ok(_owned_by_rank, str(folder), world_size=4)
    assert sorted(i for owned, _ in results for i in owned) == [0, 1]


def _file_behind(tensor: torch.Tensor) -> str:
    """Return the file that is mapped where a tensor lies, as the kernel tells it; "" for plain memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.partition("/")[1] + line.partition("/")[2]
    return ""


def _blocks_in(model: Any) -> set[int]:
    return {
        int(name.split(".")[2]) for name, _ in model.named_parameters() if name.startswith("model.layers.")
    }


def test_single_file_and_file_paths_are_taken(shared: Path) -> None:
    folder = tiny_checkpoint(shared, shards=1)
    assert load_file(folder / "model.safetensors")
    assert_same_tensors(
        load_and_shard_model("auto", str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    )


@pytest.mark.parametrize("route", ROUTES)
def test_loads_in_two_threads_keep_their_own_dtypes(tmp_path: Path, route: Any) -> None:
    """Both make parameters in the default dtype, which is that of the process."""
    wanted = {torch.bfloat16: "llama", torch.float32: "qwen3"}
    folders = {dtype: tiny_checkpoint(tmp_path, family, dtype=dtype) for dtype, family in wanted.items()}
    found: dict[torch.dtype, set[torch.dtype]] = {dtype: set() for dtype in wanted}

    def load(dtype: torch.dtype) -> None:
        for _ in range(20):
            model = load_and_shard_model("auto", folders[dtype], {1, 2}, route=route)
            found[dtype] |= {parameter.dtype for parameter in model.parameters()}

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(load, wanted))
    finally:
        sys.setswitchinterval(switch)
    assert found == {dtype: {dtype} for dtype in wanted}
    assert torch.get_default_dtype() == torch.float32
