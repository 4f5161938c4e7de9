"""fp8 and mxfp4 checkpoints load as the numbers they stand for, and nothing quantised is cast blindly."""

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
from support.counted import counted_url, keys_read
from support.families import family_model
from support.tiny import tensors_of
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt import load_and_shard_model, save_sharded_checkpoint
from sharded_ckpt.loading.quantised import Coding, from_fp8, from_mxfp4

DEEPSEEK = "deepseek_v3"  # fused experts, a router kept in float32, latent attention
UP = "model.layers.0.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


def quantise(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise as DeepSeek does: the largest number of a block becomes the largest of float8."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    quantised = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale[i, j] = weight[place].abs().max() / 448
            quantised[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
    return quantised, scale


def fp8_checkpoint(folder: Path, family: str, block: tuple[int, int]) -> Path:
    """A checkpoint whose projections are in float8, all else in bfloat16."""
    family_model(family, dtype=torch.bfloat16).save_pretrained(folder)
    tensors = {}
    for key, tensor in tensors_of(folder).items():
        if key.endswith("_proj.weight"):
            tensors[key], tensors[f"{key}_scale_inv"] = quantise(tensor.float(), block)
        else:
            tensors[key] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    say(folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)})
    return folder


def say(folder: Path, quantisation: dict[str, Any] | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", DEEPSEEK])
def test_fp8_shards_equal_what_transformers_dequantises(tmp_path: Path, family: str) -> None:
    folder = fp8_checkpoint(tmp_path / "fp8", family, (8, 8))  # no block is cut off at an edge
    native = FineGrainedFP8Config(weight_block_size=(8, 8), dequantize=True)
    reference = AutoModelForCausalLM.from_pretrained(folder, quantization_config=native)
    for owned in ({0, 2}, {1, 2}, {0, 1, 2, 3}):
        model = load_and_shard_model("auto", folder, owned)
        assert_same_tensors(model, reference, partial=len(owned) < 4)
        assert model.load_report.dequantised
        assert model.load_report  # nothing odd: it was not cast, but computed


def test_blocks_cut_off_at_an_edge_keep_their_own_scale(tmp_path: Path) -> None:
    folder = fp8_checkpoint(tmp_path / "fp8", "llama", (48, 40))  # 64 x 64 has blocks of 48 and 16 rows
    stored = tensors_of(folder)
    model = load_and_shard_model("auto", folder, dtype=torch.float32)
    state = model.state_dict()
    for key in [key for key in stored if f"{key}_scale_inv" in stored]:
        rows, columns = stored[key].shape
        i = torch.arange(rows)[:, None] // 48
        j = torch.arange(columns)[None, :] // 40
        exact = stored[key].double() * stored[f"{key}_scale_inv"].double()[i, j]
        assert torch.equal(state[key], exact.float()), key


def test_only_owned_weights_and_their_scales_are_read(tmp_path: Path) -> None:
    folder = fp8_checkpoint(tmp_path / "fp8", "llama", (16, 16))
    load_and_shard_model("auto", counted_url(folder), {1, 2})
    read = keys_read(folder)
    assert {key.split(".")[2] for key in read} == {"1", "2"}
    assert read == {
        key for key in tensors_of(folder) if key.startswith(("model.layers.1.", "model.layers.2."))
    }


def test_what_was_dequantised_is_saved_as_an_ordinary_checkpoint(tmp_path: Path) -> None:
    folder = fp8_checkpoint(tmp_path / "fp8", DEEPSEEK, (16, 16))
    model = load_and_shard_model("auto", folder)
    save_sharded_checkpoint(model, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not [key for key in tensors_of(tmp_path / "plain") if "scale" in key]
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), model)


def test_mxfp4_shards_equal_what_transformers_dequantises(tmp_path: Path) -> None:
    folder = tmp_path / "mxfp4"
    family_model("gpt_oss", dtype=torch.bfloat16).save_pretrained(folder)

    def pack(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, inner, outer = tensors.pop(key).shape
            blocks = (experts, outer, inner // 32, 16)
            tensors[f"{key}_blocks"] = torch.randint(256, blocks, generator=generator, dtype=torch.uint8)
            scales = torch.randint(110, 130, blocks[:-1], generator=generator, dtype=torch.uint8)
            tensors[f"{key}_scales"] = scales

    rewrite(folder, pack)
    say(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    reference = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))
    for owned in ({0, 2}, {0, 1, 2, 3}):
        model = load_and_shard_model("auto", folder, owned)
        assert_same_tensors(model, reference, partial=len(owned) < 4)
        assert model.load_report.dequantised == 2 * len(owned)


def test_one_scale_for_a_whole_tensor_is_read(tmp_path: Path) -> None:
    weight = torch.randn(6, 5).to(torch.float8_e5m2)
    for scale in (torch.tensor(0.5), torch.tensor([0.5])):
        assert torch.equal(from_fp8("w", weight, scale, None), weight.float() * 0.5)


def test_scales_may_be_exponents() -> None:
    weight = torch.randn(4, 4).to(torch.float8_e4m3fn)
    bytes_ = torch.tensor([[126, 129]], dtype=torch.uint8)
    wanted = weight.float() * torch.tensor([0.5, 0.5, 4.0, 4.0])
    assert torch.equal(from_fp8("w", weight, bytes_, (4, 2)), wanted)
    assert torch.equal(from_fp8("w", weight, bytes_.view(torch.float8_e8m0fnu), (4, 2)), wanted)


def test_every_four_bit_number_is_what_the_format_says() -> None:
    blocks = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 1, 16) | 0x30  # the upper half says 1.5
    numbers = from_mxfp4("w", blocks, torch.tensor([[[128]]], dtype=torch.uint8)).flatten()
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert numbers[0::2].tolist() == [2 * x for x in positive] + [-2 * x for x in positive]
    assert numbers[1::2].tolist() == [3.0] * 16


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    return fp8_checkpoint(tmp_path / "fp8", "llama", (16, 16))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"{UP}_scale_inv"), f"{UP} is torch.float8_e4m3fn in the checkpoint"),
        (
            lambda t: t.update({f"{UP}_scale_inv": torch.ones(3, 4)}),
            rf"{UP}_scale_inv has shape \(3, 4\); weights of shape \(96, 64\) in blocks of 16 x 16",
        ),
        (
            lambda t: t.update({UP: t[UP].view(torch.int8)}),
            f"{UP} has a scale_inv and is torch.int8: only float8 weights are dequantised",
        ),
        (lambda t: t.pop(UP), f"{UP}_scale_inv"),
    ],
)
def test_weights_and_scales_that_do_not_fit_are_named(
    fp8: Path, change: Callable[[Tensors], object], text: str
) -> None:
    rewrite(fp8, change)
    with pytest.raises(CheckpointError, match=text):
        load_and_shard_model("auto", fp8)


def test_wrong_4_bit_blocks_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"w_blocks is torch.uint8 of shape \(1, 2, 1, 16\), w_scales"):
        from_mxfp4("w", torch.zeros(1, 2, 1, 16, dtype=torch.uint8), torch.zeros(1, 1, 1, dtype=torch.uint8))


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "compressed-tensors", None])
def test_other_ways_to_quantise_are_refused_by_name(fp8: Path, method: str | None) -> None:
    say(fp8, {"quant_method": method})
    with pytest.raises(ConfigError, match=f"quant_method={method!r}: fp8 .* and mxfp4 are dequantised"):
        load_and_shard_model("auto", fp8)


def test_float8_that_no_config_speaks_of_is_not_cast(tmp_path: Path) -> None:
    folder = fp8_checkpoint(tmp_path / "fp8", "qwen3_moe", (16, 16))
    say(folder, None)
    rewrite(folder, lambda tensors: [tensors.pop(k) for k in list(tensors) if k.endswith("_scale_inv")])
    with pytest.raises(
        CheckpointError, match=r"is torch\.float8_e4m3fn in the checkpoint, and the model wants"
    ):
        load_and_shard_model("auto", folder)


def test_pickled_fp8_checkpoints_are_dequantised_too(fp8: Path) -> None:
    expected = load_and_shard_model("auto", fp8, {1})
    copy = shutil.copytree(fp8, fp8.parent / "pickled")
    torch.save(tensors_of(copy), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    model = load_and_shard_model("auto", copy, {1}, allow_pickle=True)
    assert_same_tensors(model, expected)


def test_scales_of_activations_are_left_aside() -> None:
    keys = ["a.weight", "a.weight_scale_inv", "a.activation_scale"]
    assert Coding("fp8").parts(keys) == {"a.weight": ("a.weight", "a.weight_scale_inv")}
