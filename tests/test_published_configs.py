"""The published heterogeneous configs are read, written back and built, without their remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from patchers import ModelDescriptor, read_block_configs, write_block_configs
from sharded_ckpt import create_sharded_model, load_model_config

CONFIGS = Path(__file__).parents[2] / "shared" / "configs"
PARAMETERS = {
    "llama-3_3-nemotron-super-49b-v1": 49_867_145_216,
    "llama-3_1-nemotron-ultra-253b-v1": 253_401_268_224,
}

pytestmark = pytest.mark.skipif(not CONFIGS.is_dir(), reason=f"the published configs are not at {CONFIGS}")


@pytest.fixture(params=sorted(PARAMETERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text((CONFIGS / f"{name}.config.json").read_text())
    return tmp_path


def test_builds_on_meta_with_the_published_number_of_parameters(name: str, folder: Path) -> None:
    config = load_model_config(folder)
    model = create_sharded_model(None, "auto", config, range(config.num_hidden_layers), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_config_keeps_what_it_said(folder: Path) -> None:
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config = load_model_config(folder)
    assert config.model_type == "llama"
    assert config.block_configs == raw["block_configs"]
    assert config.rope_parameters["factor"] == raw["rope_scaling"]["factor"]
    assert config.rope_parameters["rope_theta"] == raw["rope_theta"]
    assert config.dtype is torch.bfloat16
    for field in ("hidden_size", "vocab_size", "rms_norm_eps", "eos_token_id", "max_position_embeddings"):
        assert getattr(config, field) == raw[field]


def test_block_configs_round_trip_in_their_own_dialect(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    blocks, dialect = read_block_configs(raw)
    assert write_block_configs(blocks, dialect, raw)["block_configs"] == raw["block_configs"]


def test_descriptor_is_that_of_llama(folder: Path) -> None:
    assert ModelDescriptor.from_config(load_model_config(folder)) == ModelDescriptor.from_family("llama")
