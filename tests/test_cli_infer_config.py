"""`sharded-ckpt infer-config`: what the config should say of the blocks, told from their tensors."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from support.fake_hub import REPO, FakeHub, serve, use_hub
from support.hollow import LLAMA, PRUNED, hollow_checkpoint, pruned_checkpoint, pruned_shapes

from patchers import AttentionConfig, BlockConfig, FFNConfig, read_block_configs
from sharded_ckpt.cli import main
from sharded_ckpt.report.overview import overview

BLOCKS = [
    BlockConfig(AttentionConfig(2), FFNConfig(96)),
    BlockConfig(AttentionConfig(no_op=True), FFNConfig(96)),
    BlockConfig(AttentionConfig(2), FFNConfig(48)),
    BlockConfig(AttentionConfig(no_op=True), FFNConfig(no_op=True)),
]


@pytest.fixture
def silent(tmp_path: Path) -> Path:
    """A pruned checkpoint whose config says nothing of that."""
    return hollow_checkpoint(tmp_path / "model", pruned_shapes(), LLAMA)


@pytest.mark.parametrize("dialect", ["anymodel", "per-layer", "megatron"])
def test_the_fields_printed_say_what_the_tensors_are(
    dialect: str, silent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["infer-config", str(silent), "--dialect", dialect]) == 0
    said = capsys.readouterr()
    assert said.err == "the config says something else of blocks 1-3 than their tensors\n"
    found = read_block_configs({**LLAMA, **json.loads(said.out)})
    assert found is not None
    assert found[1].value == dialect
    assert list(map(str, found[0])) == list(map(str, BLOCKS)) or dialect == "per-layer"
    if dialect == "per-layer":
        assert json.loads(said.out)["per_layer_config"] == PRUNED


def test_what_the_config_says_already_is_said_again_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pruned_checkpoint(tmp_path / "model")
    assert main(["infer-config", str(folder), "--json"]) == 0
    assert capsys.readouterr() == (json.dumps({"per_layer_config": PRUNED}, indent=2) + "\n", "")


def test_written_it_replaces_what_the_config_said(silent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert overview(silent).notes != ()
    before = {path.name: path.read_bytes() for path in silent.iterdir() if path.name != "config.json"}
    assert main(["infer-config", str(silent), "--write"]) == 0
    assert capsys.readouterr().err.endswith(f"\n{silent}/config.json: written\n")
    raw = json.loads((silent / "config.json").read_text())
    assert {name: value for name, value in raw.items() if name != "block_configs"} == LLAMA
    assert overview(silent).notes == ()
    assert before == {path.name: path.read_bytes() for path in silent.iterdir() if path.name != "config.json"}


def test_of_a_hub_id_nothing_is_written(
    silent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(FakeHub({path.name: path.read_bytes() for path in silent.iterdir()})) as hub:
        use_hub(hub.url, tmp_path / "cache", monkeypatch)
        assert main(["infer-config", REPO, "--write"]) == 1
        huggingface_hub.close_session()
    assert f"{REPO}: only the config.json of a local directory can be written" in capsys.readouterr().err


def test_what_the_tensors_do_not_tell_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = pruned_shapes() | {"model.layers.3.mixer.in_proj.weight": [80, 64]}
    folder = hollow_checkpoint(tmp_path / "odd", shapes, LLAMA)
    assert main(["infer-config", str(folder)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "block 3: no attention of a known kind, but tensors that may be one: " in said.err
