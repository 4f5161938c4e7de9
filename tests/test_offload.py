"""A shard that is in part on disk computes what it computed in memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import family_model
from support.gloo import Gloo
from support.pipelines import stage_of
from support.stages import run_stages
from support.tiny import heterogeneous_checkpoint, tiny_checkpoint
from transformers import PreTrainedModel

from patchers.errors import CheckpointError, CollectiveError, ConfigError, OwnershipError
from sharded_ckpt import PipelineStage, load_and_shard_model, save_sharded_model
from sharded_ckpt.offload import dispatch_shard

IDS = torch.randint(4, 128, (2, 9), generator=torch.Generator().manual_seed(1))

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def on_disk(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


@pytest.mark.parametrize("tied", [False, True])
def test_a_heterogeneous_model_on_cpu_and_disk_is_exact(folder: Path, tmp_path: Path, tied: bool) -> None:
    checkpoint = heterogeneous_checkpoint(folder, tied=tied)
    whole = load_and_shard_model("auto", checkpoint)
    model = load_and_shard_model("auto", checkpoint)
    places = {"model.rotary_emb": "cpu", "model.embed_tokens": "cpu", "model.norm": "disk", "lm_head": "disk"}
    places |= {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(7)}
    del places["model.layers.0"]
    parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    places |= {f"model.layers.0.{part}": "cpu" if part == "mlp" else "disk" for part in parts}
    assert dispatch_shard(model, places, offload_dir=tmp_path) is model
    assert "model.layers.1.mlp.up_proj.weight" in on_disk(model)
    assert not {"model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"} & on_disk(model)
    assert ("lm_head.weight" in on_disk(model)) is not tied  # a tied head stays with its embedding
    assert any(tmp_path.iterdir())
    assert torch.equal(logits_of(model), logits_of(whole))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), whole.generate(IDS, **options))


def test_shards_with_stubs_are_exact_as_stages(folder: Path) -> None:
    checkpoint = heterogeneous_checkpoint(folder)
    shards = [load_and_shard_model("auto", checkpoint, owned) for owned in ({0, 1, 2}, {3, 4, 5, 6})]
    for shard in shards:
        held = sum(parameter.nbytes for parameter in shard.parameters())
        dispatch_shard(shard, max_memory={"cpu": held // 2})
        assert set(shard.hf_device_map.values()) == {"cpu", "disk"}
        assert 0 < sum(p.nbytes for p in shard.parameters() if not p.is_meta) <= held // 2
    assert torch.equal(run_stages(shards, input_ids=IDS), logits_of(load_and_shard_model("auto", checkpoint)))


def test_stages_on_disk_do_over_ranks_what_they_do_in_memory(gloo: Gloo, folder: Path) -> None:
    checkpoint = heterogeneous_checkpoint(folder, tied=True)
    whole = load_and_shard_model("auto", checkpoint, dtype=torch.float32)
    tokens = whole.generate(IDS, **GREEDY)
    loss = PipelineStage(whole).score([{"input_ids": IDS}]).loss
    for made, scored, refused in gloo.run_ok(work_of_stage_on_disk, checkpoint):
        assert all(torch.equal(one, tokens) for one in made)
        assert scored == pytest.approx(loss, rel=1e-5)
        assert "lm_head.weight, model.layers.{3-4,6}" in refused
        assert "is offloaded, so it cannot be trained" in refused


def work_of_stage_on_disk(checkpoint: Path) -> tuple[list[torch.Tensor], float, str]:
    shard = stage_of(checkpoint).shard
    stage = PipelineStage(dispatch_shard(shard, max_memory={"cpu": 1}))
    ways: list[dict[str, Any]] = [{"prefill_chunk_size": 4}, {"micro_batches": 2}, {"micro_batches": "auto"}]
    made = [stage.generate(IDS, **GREEDY, **way) for way in ways]
    loss = stage.score([{"input_ids": IDS}]).loss
    with pytest.raises(CollectiveError) as refused:
        stage.train_step({"input_ids": IDS, "labels": IDS})
    return made, loss, str(refused.value)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe", "falcon_h1"])
def test_other_families_are_exact_on_disk(family: str) -> None:
    whole, model = family_model(family), family_model(family)
    dispatch_shard(model, max_memory={"cpu": 1})
    assert set(model.hf_device_map.values()) == {"disk"}
    assert torch.equal(logits_of(model), logits_of(whole))


def test_what_fits_stays_where_it_is_and_the_folder_goes_with_the_model(folder: Path) -> None:
    model = load_and_shard_model("auto", tiny_checkpoint(folder))
    dispatch_shard(model, max_memory={"cpu": "1 GB"})
    assert not on_disk(model)
    model = dispatch_shard(load_and_shard_model("auto", tiny_checkpoint(folder)), max_memory={"cpu": "90 kB"})
    loader = model.model.layers[3].mlp.up_proj._hf_hook.weights_map.dataset
    where = Path(loader.save_folder)
    assert where.is_dir()
    del loader, model
    gc.collect()
    assert not where.exists()


def test_training_saving_and_measuring_refuse_a_shard_that_is_elsewhere(folder: Path, tmp_path: Path) -> None:
    model = dispatch_shard(load_and_shard_model("auto", tiny_checkpoint(folder)), max_memory={"cpu": 1})
    stage = PipelineStage(model)
    assert torch.equal(stage(IDS).logits, logits_of(load_and_shard_model("auto", tiny_checkpoint(folder))))
    with pytest.raises(ConfigError, match="is offloaded, so it cannot be trained: load the shard whole"):
        stage.train_step({"input_ids": IDS, "labels": IDS})
    with pytest.raises(ConfigError, match="block 0 is offloaded, so its activations cannot be measured"):
        stage.score([{"input_ids": IDS}], activations=True)
    with pytest.raises(CheckpointError, match="these tensors cannot be saved"):
        save_sharded_model(model, tmp_path / "model.safetensors")


def test_a_part_without_a_place_is_refused_by_name(folder: Path) -> None:
    model = load_and_shard_model("auto", tiny_checkpoint(folder))
    with pytest.raises(ConfigError, match=r"gives no place to lm_head.weight, model.layers.\{2-3\}"):
        dispatch_shard(model, {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"})
    with pytest.raises(ConfigError, match=r"device_map names model\.leyers, which the model does not have"):
        dispatch_shard(model, {"": "cpu", "model.leyers": "disk"})
    with pytest.raises(ConfigError, match=r"has model\.layers\.0 and also a module that it is part of"):
        dispatch_shard(model, {"": "cpu", "model.layers.0": "disk"})
    with pytest.raises(OwnershipError, match="budget 'much' is no size"):
        dispatch_shard(model, max_memory={"cpu": "much"})
