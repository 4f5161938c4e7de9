"""`sharded-ckpt verify`: what is wrong with a checkpoint, all of it, and a new index for a lost one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.hollow import pruned_checkpoint
from support.raw_files import file_bytes, header_json

from sharded_ckpt.cli import main

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pruned_checkpoint(tmp_path / "model")


def test_a_sound_checkpoint_is_told_in_a_line_and_code_0(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr() == (
        f"{folder}: no problems (25 tensors, 174848 bytes in 2 files)\n"
        "  note: no manifest: the bytes of tensors were not checked\n",
        "",
    )


def test_all_that_is_wrong_is_told_with_code_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost"] = SHARD
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert main(["verify", str(folder), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["sound"] is False
    texts = {problem["file"]: problem["text"] for problem in said["problems"]}
    assert texts["model-00001-of-00002.safetensors"] == "does not exist; the index says that it holds"
    assert texts[SHARD] == "lacks tensors that the index says it holds"
    assert ["ghost"] in [problem["keys"] for problem in said["problems"]]


def test_a_lost_index_is_written_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text("{}")
    assert main(["verify", str(folder)]) == 1
    assert "not an index" in capsys.readouterr().out
    assert main(["verify", str(folder), "--fix-index"]) == 0
    said = capsys.readouterr()
    assert said.err == f"{folder}/{INDEX}: written anew, 25 tensors in 2 files\n"
    assert said.out.startswith(f"{folder}: no problems")
    assert json.loads((folder / INDEX).read_text())["weight_map"] == lost


def test_an_index_is_not_written_over_a_gap(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / SHARD).unlink()
    before = (folder / INDEX).read_bytes()
    assert main(["verify", str(folder), "--fix-index"]) == 1
    said = capsys.readouterr()
    assert said.err == f"sharded-ckpt verify: {folder}: 1 of 2 shards are missing: {SHARD}\n"
    assert (folder / INDEX).read_bytes() == before


def test_values_that_are_no_numbers_are_found_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = header_json({"model.norm.weight": ("BF16", [2], [0, 4])})
    (tmp_path / "model.safetensors").write_bytes(file_bytes(header, b"\xc0\x7f\x80\x7f"))  # NaN, infinity
    assert main(["verify", str(tmp_path)]) == 0
    assert main(["verify", str(tmp_path), "--scan"]) == 1
    text = capsys.readouterr().out
    assert "model.safetensors: holds NaN: model.norm.weight" in text
    assert "model.safetensors: holds infinities: model.norm.weight" in text
