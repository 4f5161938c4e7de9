"""`sharded-ckpt diff`: how two checkpoints differ, and by how much."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.hollow import LLAMA, PRUNED, hollow_checkpoint, llama_shapes, pruned_checkpoint
from support.raw_files import file_bytes, header_json

from sharded_ckpt.cli import main


def diff(capsys: pytest.CaptureFixture[str], code: int, *argv: object) -> dict[str, Any]:
    assert main(["diff", *map(str, argv), "--json"]) == code
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def of_floats(folder: Path, **tensors: tuple[str, list[float]]) -> Path:
    """A checkpoint of vectors, each with its dtype, F32 or F16."""
    rows, data = {}, b""
    for name, (dtype, values) in tensors.items():
        raw = struct.pack(f"<{len(values)}{'f' if dtype == 'F32' else 'e'}", *values)
        rows[name.replace("__", ".")] = (dtype, [len(values)], [len(data), len(data) + len(raw)])
        data += raw
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(file_bytes(header_json(rows), data))
    return folder


def test_equal_checkpoints_are_equal_in_whatever_dialect_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = pruned_checkpoint(tmp_path / "one"), pruned_checkpoint(tmp_path / "other")
    assert main(["infer-config", str(other), "--dialect", "anymodel", "--write"]) == 0
    capsys.readouterr()
    assert main(["diff", str(one), str(other)]) == 0
    assert capsys.readouterr().out == f"{one} and {other}: config, blocks, tensors and values are equal\n"


def test_blocks_and_tensors_that_differ_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = hollow_checkpoint(tmp_path / "parent", llama_shapes(), LLAMA)
    child = pruned_checkpoint(tmp_path / "child")
    (child / "config.json").write_text(json.dumps({**LLAMA, "per_layer_config": PRUNED, "rope_theta": 5e5}))
    assert main(["diff", str(parent), str(child), "--no-values"]) == 1
    text = capsys.readouterr().out
    assert text.split("\n\n")[:3] == [
        f"{parent} and {child} differ",
        "config      first  second\nrope_theta  None   500000.0",
        "block           first                second\n"
        "model.layers.1  2 KV heads, 96 wide  no-op, 96 wide\n"
        "model.layers.2  2 KV heads, 96 wide  2 KV heads, 48 wide\n"
        "model.layers.3  2 KV heads, 96 wide  no-op, no-op",
    ]
    assert f"only in {parent}: model.layers.{{1,3}}.input_layernorm.weight" in text
    *_, forms, end = text.splitlines()
    assert "model.layers.2.mlp.gate_proj.weight, model.layers.2.mlp.up_proj.weight  BF16 96 x 64" in forms
    assert end.split("  ")[0] == "model.layers.2.mlp.down_proj.weight"
    assert end.endswith("  BF16 64 x 96  BF16 64 x 48")


def test_values_are_compared_block_by_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = {"model__layers__0__a": ("F32", [1.0, 2.0]), "model__norm": ("F32", [3.0])}
    same |= {"model__layers__1__b": ("F32", [0.0])}
    one = of_floats(tmp_path / "one", model__layers__1__a=("F32", [3.0, 4.0]), **same)
    other = of_floats(tmp_path / "other", model__layers__1__a=("F32", [3.0, 4.5]), **same)
    said = diff(capsys, 1, one, other)
    assert said["values"] == [
        {"name": "model.layers.1", "tensors": 1, "compared": 2, "largest": 0.5, "relative": 0.1}
    ]
    assert said["forms"] == said["config"] == said["blocks"] == {}
    assert main(["diff", str(one), str(other)]) == 1
    assert capsys.readouterr().out.endswith(
        "values of       tensors  largest  relative\nmodel.layers.1  1 of 2   0.5      0.1\n"
    )


def test_other_dtypes_are_compared_as_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = of_floats(tmp_path / "one", exact=("F32", [0.5, 2.0]), rounded=("F32", [0.1]))
    other = of_floats(tmp_path / "other", exact=("F16", [0.5, 2.0]), rounded=("F16", [0.1]))
    said = diff(capsys, 1, one, other)
    assert said["forms"] == {"exact": ["F32 2", "F16 2"], "rounded": ["F32 1", "F16 1"]}
    (rounded,) = said["values"]
    assert rounded["name"] == "rounded"
    assert 0 < rounded["relative"] < 2**-11


def test_a_value_that_is_no_number_is_a_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = of_floats(tmp_path / "one", weight=("F32", [1.0, 2.0]))
    other = of_floats(tmp_path / "other", weight=("F32", [math.nan, 2.0]))
    (weight,) = diff(capsys, 1, one, other)["values"]
    assert (weight["largest"], weight["relative"]) == ("nan", "nan")
    assert diff(capsys, 0, other, other)["equal"] is True


def test_numbers_in_a_config_that_json_lacks_are_compared_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (of_floats(tmp_path / name, weight=("F32", [1.0])) for name in ("one", "other"))
    (one / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "scale": NaN}')
    assert diff(capsys, 0, one, one)["equal"]
    (other / "config.json").write_text('{"time_step_limit": [0.0, 4.0], "scale": NaN}')
    assert diff(capsys, 1, one, other)["config"] == {"time_step_limit": [[0.0, "inf"], [0.0, 4.0]]}


def test_without_values_no_torch_is_imported(tmp_path: Path) -> None:
    folder = pruned_checkpoint(tmp_path / "model")
    code = (
        "import sys\nfrom sharded_ckpt.cli import main\n"
        f"assert main(['diff', {str(folder)!r}, {str(folder)!r}, '--no-values']) == 0\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(": config, blocks and tensors are equal\n[]\n")
