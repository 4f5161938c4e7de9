"""`sharded-ckpt convert`: a checkpoint written anew, and nothing changed but what was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import files_in
from support.compare import assert_same_tensors
from support.hollow import pruned_checkpoint
from support.tiny import NEMOTRON_NAS_BLOCKS, Block, heterogeneous_checkpoint, tensors_of

from patchers import read_block_configs
from patchers.base_sizes import BaseSizes, resolve_block
from patchers.errors import ConfigError
from sharded_ckpt.checkpoint.verify import verify
from sharded_ckpt.cli import main
from sharded_ckpt.saving.conversion import convert_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = heterogeneous_checkpoint(tmp_path_factory.mktemp("source"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nemotron")
    return heterogeneous_checkpoint(folder, blocks=NEMOTRON_NAS_BLOCKS, dialect="nemotron_nas")


def convert(source: Path, target: Path, *argv: str) -> Path:
    assert main(["convert", str(source), str(target), *argv]) == 0
    assert verify(target)
    return target


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def blocks_of(folder: Path) -> list[Any]:
    found, sizes = read_block_configs(config_of(folder)), BaseSizes.of(config_of(folder))
    assert found is not None
    return [resolve_block(block, sizes) for block in found[0]]


def assert_same_bits(source: Path, target: Path) -> None:
    one, other = tensors_of(source), tensors_of(target)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def test_into_so_many_shards(source: Path, tmp_path: Path) -> None:
    target = convert(source, tmp_path / "target", "--shards", "3", "--manifest")
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    small = ["config.json", "manifest.json", "model.safetensors.index.json", "tokenizer_config.json"]
    assert set(files_in(target)) - {"generation_config.json"} == {*shards, *small}
    assert_same_bits(source, target)
    assert config_of(target) == config_of(source)
    sizes = [(target / shard).stat().st_size for shard in shards]
    assert max(sizes) < 2 * min(sizes)


def test_into_one_file_and_back(source: Path, tmp_path: Path) -> None:
    single = convert(source, tmp_path / "single", "--single-file")
    assert [name for name in files_in(single) if "safetensors" in name] == ["model.safetensors"]
    assert_same_bits(source, single)
    back = convert(single, tmp_path / "back", "--max-shard-size", "20KB")
    assert len(list(back.glob("*.safetensors"))) > 3
    assert_same_bits(source, back)


def test_what_transformers_would_open_silently_wrong_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocks: list[Block] = [(2, 256), ("no_op", 256)]
    source = heterogeneous_checkpoint(tmp_path, blocks=blocks, dialect="nemotron_nas")
    convert(source, tmp_path / "target", "--dialect", "anymodel")
    assert "blocks 1 lack sub-blocks, and no shape differs from a plain model's" in caplog.text


@pytest.mark.parametrize("dialect", ["anymodel", "transitional"])
def test_into_another_dialect_the_blocks_stay_what_they_are(
    dialect: str, nemotron: Path, tmp_path: Path
) -> None:
    target = convert(nemotron, tmp_path / "target", "--dialect", dialect)
    found = read_block_configs(config_of(target))
    assert found is not None
    assert found[1].value == dialect
    assert blocks_of(target) == blocks_of(nemotron)
    native = dialect == "anymodel"
    assert config_of(target)["model_type"] == ("llama" if native else "nemotron-nas")
    assert_same_bits(nemotron, target)


def test_into_another_dtype_integers_stay(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tmp_path / "source"
    source.mkdir()
    tensors = {"a": torch.randn(5, 3), "b": torch.arange(4), "c": torch.randn(2).to(torch.float8_e4m3fn)}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')
    target = convert(source, tmp_path / "target", "--dtype", "bfloat16", "--single-file")
    found = load_file(target / "model.safetensors")
    assert torch.equal(found["a"], tensors["a"].bfloat16())
    assert {key: found[key].dtype for key in "bc"} == {"b": torch.int64, "c": torch.float8_e4m3fn}
    assert config_of(target) == {"model_type": "llama", "torch_dtype": "bfloat16"}


def test_what_converts_loads_as_the_source_does(source: Path, tmp_path: Path) -> None:
    from sharded_ckpt import load_and_shard_model

    target = convert(source, tmp_path / "target", "--shards", "2")
    assert_same_tensors(*(load_and_shard_model("auto", folder) for folder in (target, source)))


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "there is something already; save elsewhere, or with overwrite=True"),
        (["--overwrite", "--shards", "26"], "26 shards are too many for 25 tensors"),
        (["--overwrite", "--dialect", "nemotron-nas"], "block 0"),
        (["--overwrite", "--max-shard-size", "huge"], "max_shard_size 'huge' is no size"),
    ],
)
def test_what_cannot_be_done_leaves_the_target_as_it_was(
    argv: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pruned_checkpoint(tmp_path / "source")
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    assert main(["convert", str(source), str(target), *argv]) == 1
    assert text in capsys.readouterr().err
    assert files_in(target) == ["thesis.txt"]


def test_quantised_weights_are_not_cast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pruned_checkpoint(tmp_path / "source")
    quantised = {**config_of(source), "quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(quantised))
    assert main(["convert", str(source), str(tmp_path / "target"), "--dtype", "float16"]) == 1
    assert "says that its weights are quantised: they cannot be cast" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("shards", [0, -1, 2.5])
def test_a_number_of_files_that_cannot_be_is_refused(tmp_path: Path, shards: Any) -> None:
    with pytest.raises(ConfigError, match=f"shards is {shards}; it must be a number of files, at least 1"):
        convert_checkpoint(tmp_path / "source", tmp_path / "target", shards=shards)
