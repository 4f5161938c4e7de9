"""Every family that transformers' own loader reads, ours reads too: shard by shard, bit by bit, no more."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from support.compare import assert_same_tensors, storage_of_stubs, tensors_in
from support.counted import counted_url, keys_read
from support.families import TEXT_FAMILIES, VISION_FAMILIES, family_config, family_model
from support.family_checkpoints import family_checkpoint
from support.tiny import tensors_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from patchers.descriptor import ModelDescriptor
from patchers.families import OWN_PER_LAYER_CONFIG
from patchers.names import block_of, fold
from sharded_ckpt import load_and_shard_model
from sharded_ckpt.ownership.skeleton import skeleton_costs

pytestmark = pytest.mark.families
FAMILIES = [*TEXT_FAMILIES, *VISION_FAMILIES]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_equal_from_pretrained_and_nothing_else_is_read(families: Path, family: str) -> None:
    made = family_checkpoint(families, family)
    *halves, middle = made.ownerships
    descriptor = ModelDescriptor.of("auto", made.reference.config)
    names: set[str] = set()
    for owned in halves:
        model = load_and_shard_model(descriptor, counted_url(made.folder), owned, dtype=torch.bfloat16)
        assert_same_tensors(model, made.reference, partial=True)
        assert storage_of_stubs(model) == 0
        wanted = made.keys_for(set(model.state_dict()))
        read = keys_read(made.folder)
        assert read == wanted, f"not needed: {fold(read - wanted)}; not read: {fold(wanted - read)}"
        told = {key for key in tensors_of(made.folder) if block_of(key) in owned}
        assert told == {key for key in read if block_of(key) is not None}, family
        names |= set(tensors_in(model))
    assert names == set(tensors_in(made.reference))
    model = load_and_shard_model("auto", made.folder, middle, dtype=torch.bfloat16)
    assert_same_tensors(model, made.reference, partial=True)
    assert model.load_report.blocks == tuple(sorted(middle))


def test_as_many_families_as_claimed_are_tried() -> None:
    assert len(TEXT_FAMILIES) >= 60
    assert len(VISION_FAMILIES) >= 8


TIED = (
    *("bloom", "cohere", "gemma2", "gemma3n_text", "gpt2", "granitemoe", "mixtral", "opt", "qwen3_next"),
    *("zamba2", "gemma3", "llama4", "qwen2_vl", "qwen3_vl_moe"),  # zamba2 ties blocks to each other, too
)


@pytest.mark.parametrize("family", TIED)
def test_what_is_tied_to_an_unowned_part_is_read_from_there(families: Path, family: str) -> None:
    made = family_checkpoint(families, family, tied=True)
    last = made.num_blocks - 1
    descriptor = ModelDescriptor.of("auto", made.reference.config)
    for owned in ({0}, {last}, set(range(made.num_blocks))):
        model = load_and_shard_model(descriptor, made.folder, owned, dtype=torch.bfloat16)
        model.tie_weights()
        assert_same_tensors(model, made.reference, partial=len(owned) <= last)
    assert model.load_report.tied
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "nemotron_h", "ernie4_5_moe"])
def test_what_a_family_keeps_in_float32_stays_so(families: Path, family: str) -> None:
    made = family_checkpoint(families, family)
    model = load_and_shard_model("auto", made.folder, {made.num_blocks - 1}, dtype=torch.bfloat16)
    kept = {name for name, p in model.state_dict().items() if p.dtype == torch.float32}
    assert kept
    assert kept < set(model.state_dict())


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "qwen2_vl"])
def test_rank_without_a_block_gets_what_all_ranks_have(families: Path, family: str) -> None:
    made = family_checkpoint(families, family)
    model = load_and_shard_model("auto", made.folder, set(), dtype=torch.bfloat16)
    assert_same_tensors(model, made.reference, partial=True)
    assert not [name for name in model.state_dict() if ".0." in name]


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "qwen3_moe", "nemotron_h"])
def test_names_of_the_modules_are_understood_too(families: Path, tmp_path: Path, family: str) -> None:
    made = family_checkpoint(families, family)
    shutil.copytree(made.folder, tmp_path / "own", ignore=shutil.ignore_patterns("model*"))
    tensors = made.reference.state_dict()
    assert set(tensors) != set(tensors_of(made.folder))
    save_file(tensors, tmp_path / "own" / "model.safetensors", metadata={"format": "pt"})
    for owned in made.ownerships:
        model = load_and_shard_model("auto", tmp_path / "own", owned, dtype=torch.bfloat16)
        assert_same_tensors(model, made.reference, partial=True)


def test_checkpoint_of_the_backbone_alone_is_understood(families: Path, tmp_path: Path) -> None:
    made = family_checkpoint(families, "gpt2", tied=True)  # as the published gpt2 is
    shutil.copytree(made.folder, tmp_path / "bare", ignore=shutil.ignore_patterns("model*"))
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors_of(made.folder).items()}
    save_file(tensors, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    for owned in ({0, 2}, {1, 3}):
        model = load_and_shard_model("auto", tmp_path / "bare", owned, dtype=torch.bfloat16)
        assert_same_tensors(model, made.reference, partial=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"global_head_dim": 32},
        {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        {"num_kv_shared_layers": 2},
    ],
)
def test_per_layer_config_that_the_family_builds_itself_is_left_to_it(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    family_model("gemma4_text", **changes).save_pretrained(tmp_path / "gemma4")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma4")
    for owned in ({0, 2}, {1, 3}):
        model = load_and_shard_model("auto", tmp_path / "gemma4", owned)
        assert_same_tensors(model, reference, partial=True)


def test_families_with_a_per_layer_config_of_their_own_are_known() -> None:
    found = set()
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        with suppress(ValueError, StrictDataclassError):  # some have no default sizes
            config = config_class().get_text_config(decoder=True)
            if config.is_heterogeneous:
                found.add(config.model_type)
    assert found <= OWN_PER_LAYER_CONFIG
    assert "gemma4_text" in found
    for family in OWN_PER_LAYER_CONFIG:
        assert AutoConfig.for_model(family).is_heterogeneous


@pytest.mark.parametrize("family", ["llava", "qwen3_vl_moe", "llama4"])
def test_vision_tower_lives_with_the_first_block_and_counts_there(families: Path, family: str) -> None:
    made = family_checkpoint(families, family)
    config = AutoConfig.from_pretrained(made.folder)
    costs = skeleton_costs(config, dtype=torch.bfloat16)
    first = load_and_shard_model("auto", made.folder, {0}, dtype=torch.bfloat16)
    tower = [name for name in first.state_dict() if "vision" in name or "visual" in name]
    assert tower
    nbytes = sum(tensor.nbytes for tensor in tensors_in(first).values())
    assert costs.embedding + costs.blocks[0] + costs.everywhere == nbytes
    rest = load_and_shard_model("auto", made.folder, {1, 2, 3}, dtype=torch.bfloat16)
    assert not set(tower) & set(rest.state_dict())
    assert isinstance(first, type(AutoModelForImageTextToText.from_config(family_config(family))))
