"""What is saved of any family has the layout that the family publishes, and plain transformers opens it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.compare import assert_same_tensors
from support.families import TEXT_FAMILIES, VISION_FAMILIES
from support.family_checkpoints import family_checkpoint
from support.gloo import Gloo
from support.tiny import tensors_of

from patchers.names import fold
from sharded_ckpt import load_and_shard_model, save_sharded_checkpoint
from sharded_ckpt.saving.saved_tensors import SavedTensors, in_files

pytestmark = pytest.mark.families
FAMILIES = [*TEXT_FAMILIES, *VISION_FAMILIES]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def assert_same_files(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected), (
        f"more: {fold(set(found) - set(expected))}; less: {fold(set(expected) - set(found))}"
    )
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_is_saved_in_its_published_layout(families: Path, tmp_path: Path, family: str) -> None:
    made = family_checkpoint(families, family)
    model = load_and_shard_model("auto", made.folder)
    save_sharded_checkpoint(model, tmp_path / "saved", durable=False)
    assert_same_files(tensors_of(tmp_path / "saved"), tensors_of(made.folder))
    native = type(model).from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert_same_tensors(native, made.reference)
    again = load_and_shard_model("auto", tmp_path / "saved")
    assert_same_tensors(again, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_together_are_the_published_checkpoint(families: Path, family: str) -> None:
    made = family_checkpoint(families, family)
    found: dict[str, torch.Tensor] = {}
    for owned in made.ownerships[:2]:
        shard = load_and_shard_model("auto", made.folder, owned)
        found.update(in_files(shard, SavedTensors.of(shard).tensors))
    assert_same_files(found, tensors_of(made.folder))


SAVED_BY_RANKS = ("deepseek_v3", "nemotron_h", "qwen3_vl_moe", "zamba2")


def load_and_save(folders: list[Path], to: Path) -> None:
    for folder in folders:
        save_sharded_checkpoint(load_and_shard_model("auto", folder), to / folder.name, durable=False)


def test_ranks_together_save_the_published_checkpoint(gloo: Gloo, families: Path, tmp_path: Path) -> None:
    made = [family_checkpoint(families, family, tied=family == "zamba2") for family in SAVED_BY_RANKS]
    gloo.run_ok(load_and_save, [one.folder for one in made], tmp_path, world_size=2)
    for one in made:
        assert_same_files(tensors_of(tmp_path / one.folder.name), tensors_of(one.folder))
        native = type(one.reference).from_pretrained(tmp_path / one.folder.name, dtype=torch.bfloat16)
        assert_same_tensors(native, one.reference)
