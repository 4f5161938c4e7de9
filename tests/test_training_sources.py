"""From where a training starts: decided before anything is read, compared before anything is filled."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from support.tiny import tensors_of, tiny_checkpoint, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from patchers.errors import CheckpointError, CheckpointNotFoundError, ConfigError, MissingKeysError
from sharded_ckpt.training import (
    BaseStateDictAdapter,
    BlockQuantised,
    LoadSpec,
    ModelState,
    PrefixKeys,
    StateDictTransforms,
    export_checkpoint,
    load_sources,
    resolve_initial_load,
    save_training_state,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Adapted(nn.Module):
    """A base layer and something beside it that no base checkpoint knows."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.base, self.lora_a = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        for parameter in self.parameters():
            nn.init.constant_(parameter, value)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file({"base.weight": torch.full((2, 2), 1.0)}, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    (tmp_path / "overlay").mkdir()
    save_file({"lora_a.weight": torch.full((2, 2), 2.0)}, tmp_path / "overlay" / "model.safetensors")
    return tmp_path / "overlay"


def values(model: nn.Module) -> list[float]:
    return [float(parameter.detach().mean()) for parameter in model.parameters()]


# Resolution ------------------------------------------------------------------------------------------------


def test_what_is_given_says_what_is_loaded(base, overlay, tmp_path):
    assert resolve_initial_load() == ()
    hf = LoadSpec(str(base), model_only=True, from_hf=True, from_quantized=False, format="hf")
    assert resolve_initial_load(base, from_hf=True) == (hf,)
    assert resolve_initial_load(hf_assets_path=base, from_hf=True) == (hf,)
    assert resolve_initial_load(hf_assets_path=base) == ()
    first, second = resolve_initial_load(
        base, from_hf=True, additional_load_path=overlay, additional_from_hf=True
    )
    assert (first, second.checkpoint_id, second.partial) == (hf, str(overlay), True)
    save_training_state(tmp_path / "own", Adapted(), durable=False)
    (own,) = resolve_initial_load(
        base, from_hf=True, resume_path=tmp_path / "own", additional_load_path=overlay
    )
    assert (own.checkpoint_id, own.model_only, own.format) == (str(tmp_path / "own"), False, "training_state")
    frozen = resolve_initial_load(base, from_hf=True, resume_path=tmp_path / "own", base_is_frozen=True)
    assert [spec.checkpoint_id for spec in frozen] == [str(base), str(tmp_path / "own")]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"from_quantized": True}, ConfigError, r"pass from_hf=True, too"),
        ({"from_hf": True, "model_only": False}, ConfigError, r"no optimizer state: pass model_only=True"),
        (
            {"prefix": "model.", "initial_load_path": ".", "from_hf": True},
            ConfigError,
            r"is for directories of torch",
        ),
        ({"from_hf": True}, ConfigError, r"needs initial_load_path, or hf_assets_path"),
        (
            {"initial_load_path": "nowhere"},
            CheckpointNotFoundError,
            r"initial_load_path: nowhere is no directory",
        ),
        (
            {"additional_load_path": "nowhere"},
            CheckpointNotFoundError,
            r"additional_load_path: nowhere is no dir",
        ),
        ({"resume_path": "nowhere"}, CheckpointNotFoundError, r"resume_path: nowhere is no directory"),
        (
            {"initial_load_path": "."},
            CheckpointNotFoundError,
            r"neither training_state\.json nor \.metadata; is it",
        ),
    ],
)
def test_what_contradicts_itself_or_is_not_there_is_refused_before_anything_is_read(
    options, error, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=text):
        resolve_initial_load(**options)


# Loads -----------------------------------------------------------------------------------------------------


def test_a_base_and_what_is_put_over_it_both_land(base, overlay):
    model = Adapted()
    specs = resolve_initial_load(base, from_hf=True, additional_load_path=overlay, additional_from_hf=True)
    reports = load_sources(specs, model)
    assert values(model) == [1.0, 2.0]
    assert [report.filled for report in reports] == [1, 1]


def test_the_later_source_wins(base, tmp_path):
    save_training_state(tmp_path / "own", Adapted(7.0), durable=False)
    model = Adapted()
    specs = resolve_initial_load(base, from_hf=True, resume_path=tmp_path / "own", base_is_frozen=True)
    load_sources(specs, model)
    assert values(model) == [7.0, 7.0]


def test_what_no_source_has_is_an_error_and_nothing_is_loaded(base, overlay):
    model = Adapted(5.0)
    model.more = nn.Linear(1, 1, bias=False)
    specs = resolve_initial_load(base, from_hf=True, additional_load_path=overlay, additional_from_hf=True)
    with pytest.raises(
        MissingKeysError, match=r"none of .*base, .*overlay has more\.weight; nothing was loaded"
    ):
        load_sources(specs, model)
    assert values(model)[:2] == [5.0, 5.0]


def test_an_overlay_of_other_names_is_an_error_not_an_overlay_of_nothing(base, tmp_path):
    (tmp_path / "stale").mkdir()
    save_file({"adapter.a": torch.zeros(2, 2)}, tmp_path / "stale" / "model.safetensors")
    model = Adapted(5.0)
    specs = resolve_initial_load(
        base, from_hf=True, additional_load_path=tmp_path / "stale", additional_from_hf=True
    )
    with pytest.raises(
        CheckpointError, match=r"stale: none of its 1 tensors is one of the model: it has adapter\.a"
    ):
        load_sources(specs, model)
    assert values(model) == [5.0, 5.0]


def test_a_source_that_is_not_declared_partial_must_have_everything(base, overlay):
    hf = {"model_only": True, "from_hf": True, "from_quantized": False, "format": "hf"}
    specs = (LoadSpec(str(base), **hf), LoadSpec(str(overlay), **hf))
    with pytest.raises(MissingKeysError, match=r"overlay lacks base\.weight, and was not declared partial"):
        load_sources(specs, Adapted())


def test_a_checkpoint_of_torch_is_a_source_too(tmp_path):
    dcp.save({"model": Adapted(1.0).state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    (spec,) = resolve_initial_load(tmp_path, prefix="model.")
    assert spec.format == "dcp"
    model = Adapted()
    load_sources([spec], model)
    assert values(model) == [1.0, 1.0]


def test_names_of_hugging_face_go_through_the_models_adapter(tmp_path):
    save_file(
        {"hf.base.weight": torch.ones(2, 2), "hf.lora_a.weight": torch.ones(2, 2)},
        tmp_path / "model.safetensors",
    )
    model = Adapted()
    transforms = StateDictTransforms(PrefixKeys("hf."))
    load_sources(resolve_initial_load(tmp_path, from_hf=True), model, transforms=transforms)
    assert values(model) == [1.0, 1.0]


# Blocks of 8-bit floats ------------------------------------------------------------------------------------


def quantised(weight: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in blocks of fp8 and its scales, by loops over the blocks."""
    rows, columns = (-(-size // block) for size in weight.shape)
    packed, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            place = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = weight[place].abs().max() / 448
            packed[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
    return packed, scales


@pytest.mark.parametrize("files", [1, 2])
def test_block_quantised_weights_become_ordinary_ones_wherever_their_scales_are(tmp_path, files):
    model = nn.Linear(200, 300, bias=True).bfloat16()
    packed, scales = quantised(torch.randn(300, 200))
    parts = [{"weight": packed, "bias": torch.ones(300)}, {"weight_scale_inv": scales}]
    if files == 1:
        save_file({**parts[0], **parts[1]}, tmp_path / "model.safetensors")
    for number, part in enumerate(parts if files == 2 else []):
        save_file(part, tmp_path / f"model-0000{number + 1}-of-00002.safetensors")
    load_sources(resolve_initial_load(tmp_path, from_hf=True, from_quantized=True), model)
    expected = packed.float()
    for i in range(3):
        for j in range(2):
            expected[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scales[i, j]
    assert torch.equal(model.weight, expected.bfloat16())
    assert model.bias.eq(1).all()


def test_a_scale_of_another_name_or_shape_is_an_error_never_weights_without_scale(tmp_path):
    packed, scales = quantised(torch.randn(130, 4))
    save_file({"weight": packed, "weight_scale": scales}, tmp_path / "model.safetensors")
    specs = resolve_initial_load(tmp_path, from_hf=True, from_quantized=True)
    with pytest.raises(CheckpointError, match=r"there is no weight_scale_inv; found is weight_scale"):
        load_sources(specs, nn.Linear(4, 130, bias=False))
    with pytest.raises(CheckpointError, match=r"weight is F8_E4M3 in the checkpoint and F32 in the model"):
        load_sources(resolve_initial_load(tmp_path, from_hf=True), nn.Linear(4, 130, bias=False))
    with pytest.raises(CheckpointError, match=r"w_scale_inv has shape \(1, 2\).*of shape \(2, 1\)"):
        BlockQuantised().from_hf({"w": packed, "w_scale_inv": torch.ones(1, 2)})


def test_weights_of_four_bits_become_ordinary_ones(tmp_path):
    numbers = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    blocks = torch.randint(0, 256, (2, 3, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 134, (2, 3, 2), dtype=torch.uint8)
    save_file(
        {"experts_blocks": blocks, "experts_scales": scales, "bias": torch.ones(3)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    model = nn.ParameterDict({"experts": torch.zeros(2, 64, 3), "bias": torch.zeros(3)})
    load_sources(resolve_initial_load(tmp_path, from_hf=True, from_quantized=True), model)
    for expert, row, column in itertools.product(range(2), range(3), range(64)):
        byte = int(blocks[expert, row, column // 32, column % 32 // 2])
        code = byte >> 4 if column % 2 else byte & 15
        value = (
            (-1) ** (code >> 3) * numbers[code & 7] * 2.0 ** (int(scales[expert, row, column // 32]) - 127)
        )
        assert model["experts"][expert, column, row] == value
    assert model["bias"].eq(1).all()
    save_file(
        {"experts_blocks": blocks, "experts_scales": scales[:1], "bias": torch.ones(3)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        CheckpointError, match=r"experts_blocks is .* expected bytes, and one scale for each block"
    ):
        load_sources(resolve_initial_load(tmp_path, from_hf=True, from_quantized=True), model)


# Exports ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True)])
def test_an_export_is_an_ordinary_checkpoint_with_exactly_the_models_tensors(tmp_path, family, tied):
    parent = tiny_checkpoint(tmp_path, family, tied=tied, layers=2)
    model = AutoModelForCausalLM.from_pretrained(parent)
    export_checkpoint(tmp_path / "export", model, max_shard_size=60_000, durable=False)
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_of(parent))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    ids = torch.arange(1, 9)[None]
    assert torch.equal(opened(ids).logits, model(ids).logits)


def test_an_export_is_cast_and_the_live_model_is_not(tmp_path):
    model = tiny_model(layers=1, dtype=torch.bfloat16)
    export_checkpoint(
        tmp_path, model, transforms=StateDictTransforms(export_dtype=torch.float32), durable=False
    )
    found = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


class Reference(BaseStateDictAdapter):
    """An adapter whose reference checkpoint has other tensors than the model."""

    def to_hf(self, state_dict: Any) -> dict[str, Any]:
        return dict(state_dict)

    def from_hf(self, hf_state_dict: Any) -> dict[str, Any]:
        return dict(hf_state_dict)


def test_a_reference_with_more_or_fewer_tensors_does_not_change_what_is_written(tmp_path):
    model = tiny_model(layers=1)
    adapter = Reference(fqn_to_index_mapping={"lm_head.weight": 2, "not.there": 1})
    export_checkpoint(tmp_path, model, transforms=StateDictTransforms(adapter), durable=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(ModelState(model).state_dict())
    with pytest.raises(ConfigError, match=r"a Linear has no config, which a checkpoint needs"):
        export_checkpoint(tmp_path, nn.Linear(1, 1))
