"""A child of real weights talks nearly like its parent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from patchers import BlockConfig, FFNConfig
from sharded_ckpt import load_and_shard_model
from sharded_ckpt.children import init_child_from_parent
from sharded_ckpt.demo import PARAGRAPH, WeightsUnavailableError, smollm2_folder


@pytest.mark.slow
def test_a_child_with_half_an_ffn_loses_little_and_a_scrambled_one_everything(tmp_path: Path) -> None:
    try:
        parent = smollm2_folder(progress=False)
    except WeightsUnavailableError as error:
        pytest.skip(str(error))
    tokens = AutoTokenizer.from_pretrained(parent)(PARAGRAPH, return_tensors="pt").input_ids

    def loss(model: PreTrainedModel) -> float:
        with torch.no_grad():
            return model(tokens, labels=tokens).loss.item()

    init_child_from_parent(parent, {15: BlockConfig(ffn=FFNConfig(768))}, tmp_path / "child")
    child = load_and_shard_model("auto", tmp_path / "child", dtype=torch.float32)
    of_parent = loss(load_and_shard_model("auto", parent, dtype=torch.float32))
    assert loss(child) - of_parent < 0.5
    generator = torch.Generator().manual_seed(0)
    for block in child.model.layers:  # so that the loss is seen to tell right from wrong
        weight = block.mlp.down_proj.weight.data
        weight.copy_(weight[:, torch.randperm(weight.shape[1], generator=generator)])
    assert loss(child) - of_parent > 5
