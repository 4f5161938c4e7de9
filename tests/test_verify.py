"""Verifying finds what is wrong with a checkpoint, names it, and finds nothing where nothing is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import NAMES, save_version, values, version_in
from support.raw_files import file_bytes, header_json
from support.storages import NoExchange

from patchers.errors import CheckpointError, CheckpointNotFoundError
from sharded_ckpt.checkpoint.manifest import MANIFEST_FILE, digest_file, parse_manifest
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.checkpoint.repair import rebuild_index
from sharded_ckpt.checkpoint.verify import verify

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    save_version(tmp_path / "ckpt", 1, manifest=True)
    return tmp_path / "ckpt"


def change_index(ckpt: Path, **changes: object) -> None:
    content = json.loads((ckpt / INDEX).read_text())
    for path, value in changes.items():
        content[path] = value
    (ckpt / INDEX).write_text(json.dumps(content))


def flip_a_bit(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def found(ckpt: Path, **options: bool) -> str:
    report = verify(ckpt, **options)
    assert not report
    return "\n".join(map(str, report.problems))


def test_a_sound_checkpoint_has_no_problems(ckpt: Path) -> None:
    report = verify(ckpt, finite=True)
    assert report
    assert report.problems == report.notes == ()
    assert (report.files, report.tensors) == (3, len(values(1)))
    assert report.nbytes == sum(tensor.nbytes for tensor in values(1).values())
    assert str(report) == f"{ckpt}: no problems ({report.tensors} tensors, {report.nbytes} bytes in 3 files)"


def test_dtypes_without_nan_are_finite_also_where_torch_lacks_them(tmp_path: Path) -> None:
    rows = {"a": ("F6_E2M3", [4], [0, 3]), "b": ("F4", [2, 3], [3, 6])}
    (tmp_path / "model.safetensors").write_bytes(file_bytes(header_json(rows), b"\xff" * 6))
    assert verify(tmp_path, finite=True)


def test_a_manifest_holds_the_digest_of_every_file(ckpt: Path) -> None:
    manifest = parse_manifest((ckpt / MANIFEST_FILE).read_bytes(), "manifest")
    assert set(manifest.files) == set(os.listdir(ckpt)) - {MANIFEST_FILE}
    assert all(digest_file(ckpt / name) == said for name, said in manifest.files.items())


@pytest.mark.parametrize("storage", [None, NoExchange()], ids=["exchange", "name by name"])
def test_a_manifest_follows_saves_that_replace_a_part(ckpt: Path, storage: NoExchange | None) -> None:
    with transaction(ckpt, manifest=True, storage=storage) as save:
        save.write_file("adapter_model.safetensors", {"a": torch.ones(2)})
        (save.path / "by_hand.txt").write_text("by hand")
    names = set(parse_manifest((ckpt / MANIFEST_FILE).read_bytes(), "manifest").files)
    assert names == {"adapter_model.safetensors", "by_hand.txt", "config.json", INDEX, *SHARDS}
    assert verify(ckpt)
    save_version(ckpt, 2, storage=storage)
    assert not (ckpt / MANIFEST_FILE).exists(), "a manifest that would be wrong goes"


@pytest.mark.parametrize("file", [SHARDS[1], INDEX, "config.json"])
def test_a_flipped_bit_is_found_by_the_manifest(ckpt: Path, file: str) -> None:
    flip_a_bit(ckpt / file, -3)
    if file == SHARDS[1]:
        assert not verify(ckpt, manifest=False).problems, "nothing else can know"
    assert f"{file}: has other content than when it was saved" in found(ckpt)


def test_without_a_manifest_the_report_says_what_was_not_checked(ckpt: Path) -> None:
    (ckpt / MANIFEST_FILE).unlink()
    report = verify(ckpt)
    assert report
    assert report.notes == ("no manifest: the bytes of tensors were not checked",)


def test_a_truncated_file_does_not_hide_other_problems(ckpt: Path) -> None:
    os.truncate(ckpt / SHARDS[0], os.path.getsize(ckpt / SHARDS[0]) - 1)
    (ckpt / SHARDS[2]).unlink()
    text = found(ckpt)
    assert f"{SHARDS[0]}: the file is cut off" in text
    size = os.path.getsize(ckpt / SHARDS[0])
    assert f"{SHARDS[0]}: has {size} bytes, {size + 1} when it was saved" in text
    assert f"{SHARDS[2]}: does not exist; the index says that it holds: " in text
    assert f"{SHARDS[2]}: does not exist; the manifest lists it" in text


def test_keys_that_index_and_headers_place_differently_are_named(ckpt: Path) -> None:
    weight_map = json.loads((ckpt / INDEX).read_text())["weight_map"]
    weight_map["model.layers.9.mlp.up_proj.weight"] = SHARDS[0]
    del weight_map["model.norm.weight"]
    home = weight_map[NAMES[0]]
    wrong = next(shard for shard in SHARDS if shard != home)
    weight_map[NAMES[0]] = wrong
    change_index(ckpt, weight_map=weight_map)
    text = found(ckpt, manifest=False)
    assert (
        f"{SHARDS[0]}: lacks tensors that the index says it holds: model.layers.9.mlp.up_proj.weight" in text
    )
    assert "holds tensors that the index does not list: model.norm.weight" in text
    assert f"{wrong}: lacks tensors that the index says it holds: {NAMES[0]}" in text


def test_a_tensor_in_two_files_is_named(ckpt: Path) -> None:
    tensors = load_file(ckpt / SHARDS[0])
    key = next(iter(tensors))
    other = {**load_file(ckpt / SHARDS[1]), key: tensors[key]}
    save_file(other, ckpt / SHARDS[1])
    assert f"{SHARDS[0]}, {SHARDS[1]} all hold: {key}" in found(ckpt, manifest=False)


def test_a_wrong_total_size_is_told(ckpt: Path) -> None:
    change_index(ckpt, metadata={"total_size": 5})
    assert f"{INDEX}: total_size is 5 bytes, the tensors have 1540" in found(ckpt, manifest=False)
    change_index(ckpt, metadata={})
    report = verify(ckpt, manifest=False)
    assert report
    assert report.notes == (f"{INDEX} gives no total_size",)


def test_a_broken_index_is_told(ckpt: Path) -> None:
    (ckpt / INDEX).write_text("{")
    assert "not valid JSON" in found(ckpt)
    change = {"weight_map": {"a": "../../etc/passwd"}}
    (ckpt / INDEX).write_text(json.dumps(change))
    assert "unsafe file name '../../etc/passwd'" in found(ckpt)


def test_a_broken_manifest_is_told(ckpt: Path) -> None:
    for text in ("{", "[]", '{"format": "sharded_ckpt.manifest.v1", "files": {"../x": {}}}'):
        (ckpt / MANIFEST_FILE).write_text(text)
        assert MANIFEST_FILE in found(ckpt)
    content = {"format": "sharded_ckpt.manifest.v1", "files": {"config.json": {"size": "1", "sha256": "0"}}}
    (ckpt / MANIFEST_FILE).write_text(json.dumps(content))
    assert "config.json: expected size and sha256, found" in found(ckpt)


def test_a_stale_single_file_and_files_that_nobody_lists_are_told(ckpt: Path) -> None:
    save_file({"a": torch.zeros(1)}, ckpt / "left_over.safetensors")
    report = verify(ckpt)
    assert report
    assert report.notes == ("the index does not list left_over.safetensors",)
    save_file({"a": torch.zeros(1)}, ckpt / "model.safetensors")
    assert "model.safetensors" in found(ckpt)


def test_nan_and_infinities_are_found_when_asked_for(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    tensors = {
        "model.layers.0.w": torch.tensor([1.0, nan], dtype=torch.bfloat16),
        "model.layers.1.w": torch.tensor([1.0, nan], dtype=torch.float8_e4m3fn),
        "model.layers.2.w": torch.tensor([inf, 1.0], dtype=torch.float16),
        "complex": torch.tensor([complex(1, inf)]),
        "fine.packed": torch.arange(256, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "fine": torch.ones(3),
        "counts": torch.tensor([1, 2]),
    }
    with transaction(tmp_path / "ckpt") as save:
        save.write_tensors(tensors)
    assert verify(tmp_path / "ckpt")
    text = found(tmp_path / "ckpt", finite=True)
    assert r"holds NaN: model.layers.{0-1}.w" in text
    assert "holds infinities: complex, model.layers.2.w" in text
    assert "fine" not in text


def test_a_link_in_a_circle_is_one_problem_among_others(ckpt: Path) -> None:
    shard = min(ckpt.glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to(shard.name)
    (ckpt / "config.json").write_text("[]")
    text = found(ckpt)
    assert f"{shard}: cannot be read: Too many levels of symbolic links" in text
    assert "config.json: not a config" in text


def test_a_checkpoint_of_one_file_is_verified_too(tmp_path: Path) -> None:
    with transaction(tmp_path, manifest=True) as save:
        save.write_file("model.safetensors", values(1))
    assert verify(tmp_path, finite=True)
    assert verify(tmp_path / "model.safetensors")
    flip_a_bit(tmp_path / "model.safetensors")
    assert not verify(tmp_path)


def test_a_save_that_is_not_through_is_told(ckpt: Path) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        save_version(ckpt, 2, storage=FaultyAfterJournal(durable=False))
    assert "a save is changing names here, or died while it did" in found(ckpt)
    save_version(ckpt, 3)
    assert verify(ckpt)


class FaultyAfterJournal(NoExchange):
    """Breaks for good once the journal is written and the first shard has its name."""

    renames = 0

    def rename(self, source: object, target: object) -> None:
        self.renames += "commit" in str(source) or self.renames > 0
        if self.renames > 2:
            raise OSError(5, "Input/output error")
        super().rename(source, target)  # type: ignore[arg-type]


def test_nothing_at_the_place_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        verify(tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        verify(tmp_path / "nowhere")


def test_progress_counts_every_byte(ckpt: Path) -> None:
    done: list[int] = []
    verify(ckpt, progress=done.append)
    assert sum(done) == sum(
        os.path.getsize(ckpt / name) for name in os.listdir(ckpt) if name != MANIFEST_FILE
    )


def test_verifying_and_repairing_import_no_torch(ckpt: Path) -> None:
    code = (
        "import sys; from sharded_ckpt.checkpoint.verify import verify; "
        "from sharded_ckpt.checkpoint.repair import rebuild_index; "
        "assert verify(sys.argv[1]); rebuild_index(sys.argv[1]); assert verify(sys.argv[1]); "
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, ckpt], check=True)


# Rebuilding an index ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["lost", "broken", "wrong"])
def test_an_index_is_rebuilt_from_the_headers(ckpt: Path, damage: str) -> None:
    before = (ckpt / INDEX).read_bytes()
    if damage == "lost":
        (ckpt / INDEX).unlink()
    elif damage == "broken":
        (ckpt / INDEX).write_text("{")
    else:
        change_index(ckpt, weight_map={NAMES[0]: SHARDS[0]})
    index = rebuild_index(ckpt)
    assert (ckpt / INDEX).read_bytes() == before
    assert set(index.weight_map) == set(values(1))
    assert version_in(ckpt) == 1
    assert verify(ckpt), "the manifest follows"
    assert os.listdir(ckpt.parent) == ["ckpt"]


def test_what_else_the_index_says_is_kept(ckpt: Path) -> None:
    change_index(ckpt, metadata={"total_size": 1, "made_by": "me"})
    index = rebuild_index(ckpt)
    assert index.metadata == {"total_size": index.total_size, "made_by": "me"}
    assert json.loads((ckpt / INDEX).read_text())["metadata"] == index.metadata


def test_files_in_folders_are_found_by_the_index_or_when_nothing_else_is_there(tmp_path: Path) -> None:
    with transaction(tmp_path / "ckpt") as save:
        for name, tensor in values(1).items():
            save.write_file(f"subblocks/{name}.safetensors", {name: tensor}, index=INDEX)
    before = (tmp_path / "ckpt" / INDEX).read_bytes()
    rebuild_index(tmp_path / "ckpt")
    assert (tmp_path / "ckpt" / INDEX).read_bytes() == before
    (tmp_path / "ckpt" / INDEX).unlink()
    rebuild_index(tmp_path / "ckpt")
    assert (tmp_path / "ckpt" / INDEX).read_bytes() == before


def test_an_index_that_would_hide_a_loss_is_not_made(ckpt: Path) -> None:
    (ckpt / SHARDS[1]).rename(ckpt / "away")
    with pytest.raises(CheckpointError, match=f"1 of 3 shards are missing: {SHARDS[1]}"):
        rebuild_index(ckpt)
    (ckpt / "away").rename(ckpt / SHARDS[1])
    shutil.copy(ckpt / SHARDS[1], ckpt / "model-00001-of-00009.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"shards of several saves: model-\*-of-00003, model-\*-of-00009; give the folder",
    ):
        rebuild_index(ckpt)
    rebuild_index(ckpt, files=SHARDS)
    with pytest.raises(CheckpointError, match="hold the same tensors"):
        rebuild_index(ckpt, files=[*SHARDS, "model-00001-of-00009.safetensors"])
    with pytest.raises(CheckpointError, match="unsafe file name"):
        rebuild_index(ckpt, files=["../x.safetensors"])


def test_nothing_to_make_an_index_of_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no safetensors files to make an index of"):
        rebuild_index(tmp_path)


def test_a_broken_shard_is_named(ckpt: Path) -> None:
    flip_a_bit(ckpt / SHARDS[1], 3)
    with pytest.raises(CheckpointError, match=SHARDS[1]):
        rebuild_index(ckpt)
    assert sorted(path.name for path in ckpt.glob("model-*")) == SHARDS


def test_an_index_of_a_single_file_leaves_alone_what_lies_beside_it(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"lora": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "optim").mkdir()
    save_file({"exp_avg": torch.ones(1)}, tmp_path / "optim" / "optim.safetensors")
    assert rebuild_index(tmp_path).weight_map == {"w": "model.safetensors"}
    assert verify(tmp_path)
