"""A checkpoint that is broken, or does not fit the model, is refused in one clear sentence (groups B, C)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.compare import assert_same_tensors
from support.tiny import heterogeneous_checkpoint, tensors_of, tiny_checkpoint, write_shards

from patchers.errors import (
    BlockConfigError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    MissingKeysError,
    OwnershipError,
)
from sharded_ckpt import load_and_shard_model, load_model_config, load_sharded_state_dict

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint(tmp_path), tmp_path / "checkpoint")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    write_shards(folder, tensors, 3)


def rewrite_json(folder: Path, name: str, **change: Any) -> None:
    content = json.loads((folder / name).read_text()) | change
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_weight_map(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


ROUTES = ("direct", "converted")


def refused(
    error: type[Exception], folder: Path, *texts: str, routes: tuple[str, ...] = ROUTES, **options: Any
) -> None:
    for route in routes:
        with pytest.raises(error) as raised:
            load_and_shard_model("auto", folder, route=route, **options)
        for text in texts:
            assert text in str(raised.value)


def test_missing_parameter_is_named_and_never_made_up(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(UP))
    refused(MissingKeysError, folder, UP, str(folder), "infer_block_configs", strict=True)
    refused(MissingKeysError, folder, UP, strict=False)
    assert load_and_shard_model("auto", folder, {0, 2}).load_report


def test_missing_parameters_of_many_blocks_are_folded(folder: Path) -> None:
    rewrite(folder, lambda tensors: [tensors.pop(UP.replace("1", str(i))) for i in (0, 1, 3)])
    refused(MissingKeysError, folder, "model.layers.{0-1,3}.mlp.up_proj.weight")


def test_unexpected_parameter_is_an_error_only_when_strict(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(surprise=torch.ones(3)))
    refused(CheckpointError, folder, "1 tensors that the model does not want: surprise", "strict=False")
    for route in ("direct", "converted"):
        model = load_and_shard_model("auto", folder, strict=False, route=route)
        assert model.load_report.unexpected == ("surprise",)
        assert not model.load_report


def test_other_shape_names_key_file_and_both_shapes(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({UP: torch.ones(48, 64)}))
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][UP]
    text = f"{UP} in {file} has shape (48, 64), the model wants (96, 64)"
    refused(
        CheckpointError, folder, text, "infer_block_configs reads the block configs off the tensor shapes"
    )


def mixtral(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A checkpoint that transformers converts, after a change of its tensors."""
    made = shutil.copytree(tiny_checkpoint(folder, "mixtral", num_local_experts=4), folder / "checkpoint")
    rewrite(made, change)
    return made


CONVERTED = ("converted",)
EXPERTS = "model.layers.1.block_sparse_moe.experts"


def test_other_shape_is_named_where_transformers_converts_too(tmp_path: Path) -> None:
    key = "model.layers.1.self_attn.k_proj.weight"
    folder = mixtral(tmp_path, lambda tensors: tensors.update({key: torch.ones(16, 64)}))
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]
    text = f"{key} in {file} has shape (16, 64), the model wants (32, 64)"
    refused(
        CheckpointError,
        folder,
        "1 tensors do not fit the model",
        text,
        "infer_block_configs",
        routes=CONVERTED,
    )


def test_too_few_experts_are_counted(tmp_path: Path) -> None:
    def drop_one(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{EXPERTS}.3.")]:
            del tensors[name]

    made_of = f"3 of shape (64, 96) ({EXPERTS}.{{0-2}}.w2.weight) in model-0000"
    folder = mixtral(tmp_path, drop_one)
    refused(
        CheckpointError,
        folder,
        "layers.1.mlp.experts.down_proj",
        made_of,
        "model wants (4, 64, 96)",
        routes=CONVERTED,
    )


def test_an_expert_that_lacks_one_tensor_or_has_it_in_another_size_is_found(tmp_path: Path) -> None:
    key = f"{EXPERTS}.2.w1.weight"
    text = f"3 of shape (96, 64) ({EXPERTS}.{{0-1,3}}.w1.weight)"
    folder = mixtral(tmp_path, lambda tensors: tensors.pop(key))
    refused(
        CheckpointError,
        folder,
        "gate_up_proj is made of",
        text,
        "The files may lack tensors",
        routes=CONVERTED,
    )
    rewrite(folder, lambda tensors: tensors.update({key: torch.ones(48, 64)}))
    refused(CheckpointError, folder, text, f"1 of shape (48, 64) ({key})", routes=CONVERTED)


def test_missing_tensor_names_the_checkpoint_where_transformers_converts_too(tmp_path: Path) -> None:
    key = "model.layers.1.input_layernorm.weight"
    folder = mixtral(tmp_path, lambda tensors: tensors.pop(key))
    refused(
        MissingKeysError, folder, f"{folder} has no tensors for 1 of the shard's: {key}", routes=CONVERTED
    )


def test_pruned_ffn_without_block_configs_is_refused_not_guessed(tmp_path: Path) -> None:
    folder = shutil.copytree(
        heterogeneous_checkpoint(tmp_path, blocks=[(2, 96), (2, 32)]), tmp_path / "checkpoint"
    )
    rewrite_json(folder, "config.json", block_configs=...)
    refused(CheckpointError, folder, "3 tensors do not fit the model", "(32, 64), the model wants (96, 64)")


@pytest.mark.parametrize(("keep", "numbers"), [(3, ("3", "7")), (6, ("6", "7"))])
def test_too_few_block_configs_name_both_numbers(tmp_path: Path, keep: int, numbers: tuple[str, str]) -> None:
    folder = shutil.copytree(heterogeneous_checkpoint(tmp_path), tmp_path / "checkpoint")
    blocks = json.loads((folder / "config.json").read_text())["block_configs"]
    rewrite_json(folder, "config.json", block_configs=blocks[:keep])
    refused(BlockConfigError, folder, *numbers)


def test_too_many_block_configs_name_both_numbers(tmp_path: Path) -> None:
    folder = shutil.copytree(heterogeneous_checkpoint(tmp_path), tmp_path / "checkpoint")
    blocks = json.loads((folder / "config.json").read_text())["block_configs"]
    rewrite_json(folder, "config.json", block_configs=[*blocks, blocks[0]])
    refused(BlockConfigError, folder, "8", "7")


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_weights_left_over_from_a_removed_part_are_named(tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(
        heterogeneous_checkpoint(tmp_path, blocks=[(2, 96), (2, 96)]), tmp_path / "checkpoint"
    )
    blocks = json.loads((folder / "config.json").read_text())["block_configs"]
    blocks[1][part]["no_op"] = True
    rewrite_json(folder, "config.json", block_configs=blocks)
    left = {"attention": "model.layers.1.self_attn.q_proj.weight", "ffn": "model.layers.1.mlp.up_proj.weight"}
    refused(
        CheckpointError,
        folder,
        left[part],
        "If the config removes their blocks on purpose, pass strict=False",
    )


@pytest.mark.parametrize(
    ("owned", "text"),
    [
        ([0, 4], "4"),
        ([-1], "-1"),
        ([1, 1, 2], "1"),
        (["0"], "'0'"),
        ([True], "True"),
        ([0.5], "0.5"),
    ],
)
def test_impossible_ownership_is_refused_naming_the_index(folder: Path, owned: list[Any], text: str) -> None:
    refused(OwnershipError, folder, text, owned_block_indexes=owned)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_unfit_dtype_of_a_quantised_checkpoint_is_refused_not_cast(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    refused(CheckpointError, folder, f"{UP} is {dtype}", "a quantised tensor is not cast blindly")


def test_a_checkpoint_without_tensors_lacks_all_of_them(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    rewrite_json(folder, "config.json", dtype=...)
    refused(MissingKeysError, folder, "model.embed_tokens.weight", str(folder))


def test_integer_tensors_keep_their_dtype_and_value(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(counter=torch.tensor([2**40 + 1])))
    model = load_and_shard_model("auto", folder, strict=False, dtype=torch.bfloat16)
    assert model.load_report.unexpected == ("counter",)


def test_absent_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="absent"):
        load_and_shard_model("auto", tmp_path / "absent")


def test_folder_without_weights_says_so(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    refused(CheckpointNotFoundError, folder, str(folder))


def test_missing_shards_are_all_named_with_their_tensors(folder: Path) -> None:
    for number in (1, 3):
        (folder / f"model-0000{number}-of-00003.safetensors").unlink()
    refused(
        CheckpointNotFoundError,
        folder,
        "model-00001-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "tensors",
    )


def test_rank_needs_only_its_own_shards_to_be_there(folder: Path) -> None:
    reference = load_and_shard_model("auto", folder, {0}, materialize=True)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {f for k, f in weight_map.items() if k.startswith(("model.layers.0.", "model.embed"))}
    for file in set(weight_map.values()) - needed:
        (folder / file).unlink()
    assert_same_tensors(load_and_shard_model("auto", folder, {0}), reference)


def test_truncated_shard_names_the_file(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(CheckpointError, folder, shard.name)


def test_pointer_of_git_lfs_is_recognised(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    refused(CheckpointError, folder, shard.name, "LFS")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a\\b.safetensors", "", "."])
def test_shard_names_that_lead_outside_are_refused(folder: Path, name: str) -> None:
    edit_weight_map(folder, lambda weight_map: weight_map.update({UP: name}))
    refused(CheckpointError, folder, repr(name) if name else "")


def test_ghost_key_names_key_and_shard(folder: Path) -> None:
    other = "model-00001-of-00003.safetensors"
    edit_weight_map(folder, lambda weight_map: weight_map.update({"lm_head.weight": other}))
    refused(CheckpointError, folder, "lm_head.weight", other)


def test_stale_single_file_beside_an_index_is_refused_not_preferred(folder: Path) -> None:
    tensors = {name: tensor + 1 for name, tensor in tensors_of(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(CheckpointError, folder, "model.safetensors", "model.safetensors.index.json")


def test_directory_in_which_a_save_was_cut_off_is_refused_with_the_way_out(folder: Path) -> None:
    (folder.parent / f".{folder.name}.saving").mkdir()
    (folder.parent / f".{folder.name}.saving" / "commit.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a save was cut off while it changed names.*recover"):
        load_and_shard_model("auto", folder)


def test_pickled_weights_are_refused_with_a_hint(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    refused(CheckpointError, folder, "pytorch_model.bin", "allow_pickle=True")


def test_pickled_weights_are_read_for_those_who_ask(folder: Path) -> None:
    reference, saved = load_and_shard_model("auto", folder, materialize=True), tensors_of(folder)
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(saved, folder / "pytorch_model.bin")
    assert_same_tensors(load_and_shard_model("auto", folder, allow_pickle=True), reference)
    half = load_and_shard_model("auto", folder, {1}, allow_pickle=True, dtype=torch.bfloat16)
    assert half.load_report.cast == {"float32 -> bfloat16": tuple(half.state_dict())}
    assert set(load_sharded_state_dict(folder, [UP], allow_pickle=True)) == {UP}


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('the pickle ran')",))


def test_pickles_run_no_code_even_for_those_who_ask(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({"a": Bomb()}, folder / "pytorch_model.bin")
    refused(CheckpointError, folder, "pytorch_model.bin", allow_pickle=True)


def test_config_of_unknown_family_says_so(folder: Path) -> None:
    rewrite_json(folder, "config.json", model_type="llamma")
    refused(
        ConfigError, folder, "model_type 'llamma', which transformers does not know", "trust_remote_code=True"
    )


def test_config_without_family_says_so(folder: Path) -> None:
    rewrite_json(folder, "config.json", model_type=...)
    refused(ConfigError, folder, "config.json", "has no model_type")


def test_config_that_is_no_json_names_the_file(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(CheckpointError, folder, "config.json")


def test_remote_code_is_never_run_unasked(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    rewrite_json(
        folder, "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    )
    assert load_and_shard_model("auto", folder).load_report
    assert load_model_config(folder).model_type == "llama"


def test_nemotron_nas_without_block_configs_says_so(tmp_path: Path) -> None:
    folder = shutil.copytree(
        heterogeneous_checkpoint(tmp_path, dialect="nemotron_nas"), tmp_path / "checkpoint"
    )
    rewrite_json(folder, "config.json", block_configs=...)
    with pytest.raises(ConfigError, match="block_configs"):
        load_model_config(folder)


@pytest.mark.parametrize("field", ["window_length", "num_sink_tokens", "sparsify"])
def test_fields_that_are_not_built_are_refused_when_set(tmp_path: Path, field: str) -> None:
    folder = shutil.copytree(
        heterogeneous_checkpoint(tmp_path, dialect="nemotron_nas"), tmp_path / "checkpoint"
    )
    blocks = json.loads((folder / "config.json").read_text())["block_configs"]
    blocks[2]["attention"][field] = 4
    rewrite_json(folder, "config.json", block_configs=blocks)
    refused(BlockConfigError, folder, "block 2", field)
