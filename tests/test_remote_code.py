"""Code in a checkpoint runs only for those who asked for it, and then gives the same model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.compare import assert_same_tensors
from support.tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM

from patchers.errors import ConfigError
from sharded_ckpt import load_and_shard_model

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path, modules = sys.path.copy(), set(sys.modules)
    folder = shutil.copytree(tiny_checkpoint(tmp_path), tmp_path / "own")
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    yield folder
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


def test_is_refused_by_default(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"which transformers does not know.*trust_remote_code=True"):
        load_and_shard_model("auto", folder)
    assert not any(name.startswith("transformers_modules.own") for name in sys.modules)


def test_gives_the_same_model_when_trusted(folder: Path) -> None:
    model = load_and_shard_model("auto", folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert_same_tensors(model, AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))
    shard = load_and_shard_model("auto", folder, {1, 2}, trust_remote_code=True)
    assert_same_tensors(shard, model, partial=True)
