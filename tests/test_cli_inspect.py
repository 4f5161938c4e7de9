"""`sharded-ckpt inspect`: what is in a checkpoint, from headers and config alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from support.fake_hub import REPO, FakeHub, serve, use_hub
from support.hollow import (
    LLAMA,
    PRUNED,
    attention_shapes,
    hollow_checkpoint,
    llama_shapes,
    pruned_checkpoint,
    pruned_shapes,
    without,
)

from patchers import AttentionConfig, BlockConfig, FFNConfig, MoEConfig
from sharded_ckpt.cli import main
from sharded_ckpt.report.overview import overview


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    return pruned_checkpoint(tmp_path / "pruned")


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["inspect", *argv]) == 0
    return capsys.readouterr().out


def test_each_block_and_each_kind_of_tensor_is_one_line(
    pruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, str(pruned))
    assert text.splitlines()[:9] == [
        f"{pruned}: llama, blocks said in per-layer",
        "87.42 k parameters in 25 tensors, 174.85 kB in 2 files (BF16 174.85 kB)",
        "",
        "block  attention   FFN      parameters  bytes     shards",
        "0      2 KV heads  96 wide  30.85 k     61.70 kB  1",
        "1      no-op       96 wide  18.50 k     36.99 kB  1-2",
        "2      2 KV heads  48 wide  21.63 k     43.26 kB  2",
        "3      no-op       no-op    0           0 B",
        "",
    ]
    assert "model.layers.{0-1}.mlp.up_proj.weight " in text
    assert "model.layers.2.mlp.up_proj.weight " in text


def test_json_says_the_same_for_programs(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = json.loads(printed(capsys, str(pruned), "--json"))
    assert (said["family"], said["dialect"], said["tensors"], said["notes"]) == ("llama", "per-layer", 25, [])
    assert said["blocks"][2] == {
        "stack": "model.layers",
        "index": 2,
        "config": {"attention": {"num_key_value_heads": 2}, "ffn": {"intermediate_size": 48}},
        "parameters": 21632,
        "nbytes": 43264,
        "files": ["model-00002-of-00002.safetensors"],
    }
    assert sum(group["count"] for group in said["groups"]) == 25
    assert sum(group["nbytes"] for group in said["groups"]) == said["nbytes"] == 174848


def test_a_notebook_shows_tables(pruned: Path) -> None:
    html = overview(pruned)._repr_html_()
    assert html.count("<table>") == 2
    assert "<td>48 wide</td>" in html


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        (
            {"per_layer_config": {**PRUNED, "3": {"skip": ["mlp"]}}},
            "note: block 3: the config says BlockConfig(attention=AttentionConfig(num_key_value_heads=2), "
            "ffn=FFNConfig(no_op=True)), the tensors BlockConfig(attention=AttentionConfig(no_op=True), ",
        ),
        ({"num_hidden_layers": 2}, "note: block 2: beyond the last block: the config says 2"),
        ({"num_attention_heads": None}, "note: blocks 0,2: "),
        ({"num_hidden_layers": None}, "note: there is no config.json that says the number of blocks"),
    ],
)
def test_what_does_not_fit_is_noted(
    changed: dict[str, Any], note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hollow_checkpoint(tmp_path / "odd", pruned_shapes(), {**LLAMA, **changed})
    assert note in printed(capsys, str(folder))


def test_blocks_that_do_not_tell_what_they_are_are_not_guessed(tmp_path: Path) -> None:
    shapes = llama_shapes(2) | {"model.layers.0.mixer.in_proj.weight": [80, 64]}
    shapes = without(shapes, "layers.0.self_attn")
    found = overview(hollow_checkpoint(tmp_path / "odd", shapes, {**LLAMA, "num_hidden_layers": 2}))
    assert found.blocks[0].config is None
    assert found.blocks[1].config == BlockConfig(AttentionConfig(2), FFNConfig(96))
    (note,) = found.notes
    assert note.startswith(
        "block 0: no attention of a known kind, but tensors that may be one: mixer.in_proj"
    )


def test_blocks_beside_the_language_model_are_told_apart(tmp_path: Path) -> None:
    text = {name.replace("model.", "model.language_model.", 1): size for name, size in llama_shapes().items()}
    vision = {f"model.visual.blocks.{index}.mlp.up_proj.weight": [32, 8] for index in range(6)}
    config = {"model_type": "qwen2_vl", "text_config": LLAMA, "vision_config": {"depth": 6}}
    found = overview(hollow_checkpoint(tmp_path / "vl", text | vision, config))
    assert [row.config for row in found.blocks if row.stack == "model.visual.blocks"] == [None] * 6
    of_text = [row.config for row in found.blocks if row.stack == "model.language_model.layers"]
    assert of_text == [BlockConfig(AttentionConfig(2), FFNConfig(96))] * 4
    assert "model.visual.blocks.5" in str(found)


def expert_shapes(layers: int, experts: int) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for index in range(layers):
        block = f"model.layers.{index}.mlp"
        shapes |= attention_shapes(index, 2) | {f"{block}.gate.weight": [experts, 64]}
        for expert in range(experts):
            sizes = {"gate_proj": [8, 64], "up_proj": [8, 64], "down_proj": [64, 8]}
            shapes |= {f"{block}.experts.{expert}.{name}.weight": size for name, size in sizes.items()}
    return shapes


def expert_config(layers: int, experts: int) -> dict[str, Any]:
    moe = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return {**LLAMA, "model_type": "qwen3_moe", "num_hidden_layers": layers, "head_dim": 16, **moe}


def test_experts_are_folded_and_counted(tmp_path: Path) -> None:
    shapes = without(expert_shapes(2, 3), "layers.1.mlp.experts.1.")
    found = overview(hollow_checkpoint(tmp_path / "moe", shapes, expert_config(2, 3), shards=1))
    assert found.blocks[0].config is not None
    assert found.blocks[0].config.ffn.moe == MoEConfig(3, 2, 8, 0)
    assert found.blocks[1].config is None, "an expert is missing"
    (group,) = [group for group in found.groups if "up_proj" in group.name]
    assert (group.name, group.count) == ("model.layers.{0-1}.mlp.experts.{0-2}.up_proj.weight", 5)
    assert "3 experts, 8 wide" in str(found)


def test_a_hundred_thousand_tensors_are_shown_soon_and_without_torch(tmp_path: Path) -> None:
    """The goal, 0.5 s, is for a machine with nothing else to do: see docs/command_line.md."""
    folder = hollow_checkpoint(tmp_path / "many", expert_shapes(65, 512), expert_config(65, 512), shards=8)
    code = (
        "import sys\nfrom sharded_ckpt.cli import main\n"
        f"assert main(['inspect', {str(folder)!r}]) == 0\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])\n"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begin
    assert " parameters in 100230 tensors, " in done.stdout
    assert done.stdout.endswith("\n[]\n")
    assert seconds < 5


def test_of_a_hub_id_only_headers_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hollow_checkpoint(tmp_path / "wide", llama_shapes(width=4096), LLAMA)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with serve(FakeHub(files)) as hub:
        use_hub(hub.url, tmp_path / "cache", monkeypatch)
        assert printed(capsys, REPO).splitlines()[1:] == printed(capsys, str(folder)).splitlines()[1:]
        huggingface_hub.close_session()
    for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert hub.fetched[shard] <= 256 * 2**10 < len(files[shard])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no such file or directory; did you mean "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "it is a git-LFS pointer"),
        (b"", "the file is empty; an incomplete download or save?"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(
    content: bytes | None, text: str, pruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = pruned
    if content is None:
        wanted = pruned.with_name("prunde")
    else:
        (pruned / "model-00001-of-00002.safetensors").write_bytes(content)
    assert main(["inspect", str(wanted)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("sharded-ckpt inspect: ")
    assert said.err.count("\n") == 1
    assert text in said.err
