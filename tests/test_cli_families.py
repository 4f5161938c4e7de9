"""The commands take checkpoints of every kind: vision towers, latent attention, packed experts, mixers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.families import family_model

from sharded_ckpt.cli import main
from sharded_ckpt.report.model_blocks import model_blocks


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "deepseek_v3", "gpt_oss", "zamba2", "mamba"])
def test_a_checkpoint_of_any_family_can_be_looked_at(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = family_model(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="100kB")
    folder = str(tmp_path / "model")
    assert main(["inspect", folder, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    count = len([row for row in seen["blocks"] if row["stack"] == seen["stack"]])
    assert count == model.config.get_text_config().num_hidden_layers == len(model_blocks(folder))
    png = tmp_path / "plan.png"
    argv = ["--ranks", "2", "--memory", "1GB", "--length", "64", "--png", str(png), "--json"]
    assert main(["plan", folder, *argv]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [block for rank in said["ranks"] for block in rank["blocks"]] == list(range(count))
    assert sum(reads["nbytes"] for reads in said["reads"]) >= seen["nbytes"]
    assert png.stat().st_size > 5000
    assert main(["diff", folder, folder]) == 0
    assert main(["verify", folder]) == 0
