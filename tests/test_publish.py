"""A save is there as a whole or not at all, and leaves alone what is not its own."""

from __future__ import annotations

import json
import logging
import mmap
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoints import files_in, fill, save_version, stranger_reads, values, version_in
from support.storages import NoExchange, WatchedStorage
from support.threads import ThreadRank, run_ranks

from patchers.errors import CheckpointError, CollectiveError, ConfigError
from sharded_ckpt.checkpoint import publish
from sharded_ckpt.checkpoint.index import open_index
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.checkpoint.reader import open_checkpoint
from sharded_ckpt.checkpoint.repair import rebuild_index
from sharded_ckpt.checkpoint.source import open_source
from sharded_ckpt.checkpoint.storage import LocalStorage
from sharded_ckpt.checkpoint.verify import verify


def version_of(folder: Path) -> int:
    return int(stranger_reads(folder)["scale"])


@pytest.fixture(params=["exchange", "name by name", "in the working directory"])
def options(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """The ways to change a directory that exists, `tmp_path / "ckpt"`."""
    if request.param == "in the working directory":
        (tmp_path / "ckpt").mkdir()
        monkeypatch.chdir(tmp_path / "ckpt")
    return {"storage": NoExchange()} if request.param == "name by name" else {}


def test_a_new_directory_appears_with_hugging_face_names(tmp_path: Path) -> None:
    save_version(tmp_path / "deep" / "er" / "ckpt", 1)
    assert version_in(tmp_path / "deep" / "er" / "ckpt") == 1
    assert files_in(tmp_path) == [
        "deep/er/ckpt/config.json",
        "deep/er/ckpt/model-00001-of-00003.safetensors",
        "deep/er/ckpt/model-00002-of-00003.safetensors",
        "deep/er/ckpt/model-00003-of-00003.safetensors",
        "deep/er/ckpt/model.safetensors.index.json",
    ]


def test_one_shard_has_an_index_too(tmp_path: Path) -> None:
    with transaction(tmp_path / "ckpt") as save:
        save.write_tensors({"a": torch.zeros(2, 3)})
    index = json.loads((tmp_path / "ckpt" / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 24}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    save_version(tmp_path / "ckpt", 1)
    with transaction(tmp_path / "ckpt") as save:
        fill(save, 2)
        assert version_in(tmp_path / "ckpt") == 1
    assert version_in(tmp_path / "ckpt") == 2


def test_saving_over_a_checkpoint_replaces_it_whole(tmp_path: Path, options: dict[str, Any]) -> None:
    for version in range(4):
        save_version(tmp_path / "ckpt", version, **options)
        assert version_in(tmp_path / "ckpt") == version
        assert len(files_in(tmp_path)) == 5
    assert open_index(open_source(tmp_path / "ckpt")).total_size == sum(t.nbytes for t in values(3).values())


def test_files_that_the_save_does_not_own_stay(tmp_path: Path, options: dict[str, Any]) -> None:
    ckpt = tmp_path / "ckpt"
    save_version(ckpt, 1, **options)
    (ckpt / "sub" / "empty").mkdir(parents=True)
    (ckpt / "sub" / "notes.txt").write_text("mine")
    (ckpt / "sub" / "notes.txt").chmod(0o640)
    (ckpt / "link").symlink_to("sub/notes.txt")
    (ckpt / "dangling").symlink_to("nowhere")
    before = os.stat(ckpt / "sub" / "notes.txt")
    save_version(ckpt, 2, **options)
    assert version_in(ckpt) == 2
    after = os.stat(ckpt / "sub" / "notes.txt")
    assert (ckpt / "sub" / "notes.txt").read_text() == "mine"
    assert after.st_mode == before.st_mode
    assert after.st_ino == before.st_ino, "carried over by a link, not copied"
    assert os.readlink(ckpt / "link") == "sub/notes.txt"
    assert os.readlink(ckpt / "dangling") == "nowhere"
    assert (ckpt / "sub" / "empty").is_dir()


def test_stale_files_of_the_same_stem_go(tmp_path: Path, options: dict[str, Any]) -> None:
    ckpt = tmp_path / "ckpt"
    (ckpt / "subblocks").mkdir(parents=True, exist_ok=True)
    stale = {"a": torch.zeros(1)}
    for name in ("model.safetensors", "model-00001-of-00009.safetensors", "subblocks/block_0.safetensors"):
        save_file(stale, ckpt / name)
    save_file(stale, ckpt / "adapter_model.safetensors")
    (ckpt / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "subblocks/block_0.safetensors"}}'
    )
    (ckpt / "manifest.json").write_text("stale")
    save_version(ckpt, 1, **options)
    assert version_in(ckpt) == 1
    assert "adapter_model.safetensors" in files_in(ckpt)
    assert len(files_in(ckpt)) == 6
    assert not (ckpt / "subblocks").exists()


def test_an_index_that_is_broken_is_replaced_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_version(tmp_path / "ckpt", 1)
    (tmp_path / "ckpt" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    (tmp_path / "secret").write_text("stays")
    save_version(tmp_path / "ckpt", 2)
    assert version_in(tmp_path / "ckpt") == 2
    assert (tmp_path / "secret").exists()
    assert "unsafe file name '../../secret'" in caplog.text


def test_a_single_file_replaces_the_shards_of_its_stem(tmp_path: Path, options: dict[str, Any]) -> None:
    save_version(tmp_path / "ckpt", 1, **options)
    with transaction(tmp_path / "ckpt", **options) as save:
        save.write_file("model.safetensors", values(2))
    assert files_in(tmp_path / "ckpt") == ["config.json", "model.safetensors"]
    assert torch.equal(load_file(tmp_path / "ckpt" / "model.safetensors")["scale"], torch.tensor(2.0))


def test_an_empty_directory_is_as_good_as_none(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "ckpt" / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "ckpt" / "other").mkdir()
    for version in (1, 2):
        with transaction(tmp_path / "ckpt", **options) as save:
            save.write_tensors(values(version), stem="sub/deep/model")
        assert version_of(tmp_path / "ckpt" / "sub" / "deep") == version
    assert (tmp_path / "ckpt" / "other").is_dir()


def test_a_link_in_the_place_of_a_folder_is_replaced_or_refused_and_never_written_through(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    (tmp_path / "ckpt").mkdir(exist_ok=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "ckpt" / "sub").symlink_to(tmp_path / "elsewhere")
    is_exchanged = not options and Path.cwd() != tmp_path / "ckpt"
    text = "sub would have to be a file and a directory; move away what is there"
    with (
        nullcontext() if is_exchanged else pytest.raises(CheckpointError, match=text),
        transaction(tmp_path / "ckpt", **options) as save,
    ):
        save.supersede("*")
        save.write_tensors(values(1), stem="sub/model")
    if is_exchanged:
        assert version_of(tmp_path / "ckpt" / "sub") == 1
    else:
        assert os.listdir(tmp_path / "ckpt") == ["sub"]
    assert os.listdir(tmp_path / "elsewhere") == []


def test_superseded_files_go(tmp_path: Path, options: dict[str, Any]) -> None:
    ckpt = tmp_path / "ckpt"
    (ckpt / "optim").mkdir(parents=True, exist_ok=True)
    for name in ("optim/old.bin", "tokenizer.json", "keep.json"):
        (ckpt / name).write_text(name)
    with transaction(ckpt, **options) as save:
        save.supersede("optim/*", "tokenizer*")
        save.write_tensors({"a": torch.zeros(1)}, stem="optim/state")
    assert files_in(ckpt) == [
        "keep.json",
        "optim/state-00001-of-00001.safetensors",
        "optim/state.safetensors.index.json",
    ]
    index = json.loads((ckpt / "optim" / "state.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": "state-00001-of-00001.safetensors"}


def test_stems_that_begin_alike_do_not_replace_each_other(tmp_path: Path, options: dict[str, Any]) -> None:
    ckpt = tmp_path / "ckpt"
    for stem in ("model-ema", "model", "model_old", "model", "model-ema"):
        with transaction(ckpt, **options) as save:
            save.write_tensors({"a": torch.ones(2)}, stem=stem)
    indexes = [name for name in files_in(ckpt) if name.endswith(".index.json")]
    assert len(indexes) == 3
    assert len(files_in(ckpt)) == 6
    assert all(open_index(open_source(ckpt / name)).keys() == {"a"} for name in indexes)


def test_a_stem_is_written_in_one_form(tmp_path: Path) -> None:
    def save_both() -> None:
        with transaction(tmp_path / "ckpt") as save:
            save.write_tensors({"a": torch.ones(2)})
            save.write_file("model.safetensors", {"a": torch.ones(2)})

    with pytest.raises(CheckpointError, match=r"model\.safetensors: written beside the index model"):
        save_both()


def test_files_of_given_names_can_share_an_index(tmp_path: Path, options: dict[str, Any]) -> None:
    ckpt, index = tmp_path / "ckpt", "model.safetensors.index.json"
    for version in (1, 2):
        with transaction(ckpt, **options) as save:
            for name, tensor in values(version).items():
                file = f"subblocks/{name.replace('.', '_')}.safetensors"
                save.write_file(file, {name: tensor}, index=index, index_metadata={"made_by": "me"})
            save.write_json("config.json", {"version": version})
        assert version_in(ckpt) == version
        assert len(files_in(ckpt)) == 2 + len(values(1))
    assert json.loads((ckpt / index).read_text())["metadata"]["made_by"] == "me"


def test_what_others_put_into_the_stage_is_published_with_the_modes_of_the_umask(tmp_path: Path) -> None:
    with transaction(tmp_path / "ckpt") as save:
        save_file({"a": torch.zeros(1)}, save.path / "extra.safetensors")  # safetensors leaves 0600
        (save.path / "code").mkdir()
        (save.path / "code" / "run.py").write_text("pass")
        save.copy(__file__, "code/test.py")
        save.write_tensors({"a": torch.zeros(1)})
    ckpt = tmp_path / "ckpt"
    assert files_in(ckpt)[:3] == ["code/run.py", "code/test.py", "extra.safetensors"]
    assert os.stat(ckpt / "extra.safetensors").st_mode == os.stat(ckpt / "code" / "run.py").st_mode
    assert (ckpt / "code" / "test.py").read_bytes() == Path(__file__).read_bytes()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        for directory in (tmp_path / "ckpt", tmp_path / "ckpt"):
            save_version(directory, 1)
        for path in (tmp_path / "ckpt").rglob("*"):
            assert os.stat(path).st_mode & 0o777 == 0o666 & ~umask
        assert os.stat(tmp_path / "ckpt").st_mode & 0o777 == 0o777 & ~umask
    finally:
        os.umask(before)


def test_the_mode_of_the_directory_stays(tmp_path: Path) -> None:
    save_version(tmp_path / "ckpt", 1)
    (tmp_path / "ckpt").chmod(0o2750)
    save_version(tmp_path / "ckpt", 2)
    assert os.stat(tmp_path / "ckpt").st_mode & 0o7777 == 0o2750


def test_a_mapping_opened_before_a_save_still_reads_the_old_bytes(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    ckpt = tmp_path / "ckpt"
    save_version(ckpt, 1, **options)
    shard = next(ckpt.glob("model-*.safetensors"))
    with open(shard, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    old = bytes(mapped)
    tensors = stranger_reads(ckpt)  # mapped by safetensors
    for version in (2, 3):
        save_version(ckpt, version, **options)
    assert bytes(mapped) == old
    assert all(torch.equal(tensors[name], wanted) for name, wanted in values(1).items())
    mapped.close()


def test_saving_what_is_mapped_from_the_very_same_directory(tmp_path: Path, options: dict[str, Any]) -> None:
    ckpt = tmp_path / "ckpt"
    save_version(ckpt, 1, **options)
    tensors = stranger_reads(ckpt)
    tensors["scale"].data.fill_(2.0)
    for i, name in enumerate(name for name in values(2) if name not in ("scale", "none")):
        tensors[name].data.fill_(2 + i / 8)  # changed behind the back of the version counter
    with transaction(ckpt, **options) as save:
        save.write_tensors(tensors)
        save.write_json("config.json", {"version": 2})
    assert version_in(ckpt) == 2


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127], ids=["255 bytes", "127 letters of 2 bytes"])
def test_a_directory_may_have_the_longest_name_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for version in (1, 2):
        save_version(tmp_path / name, version)
    monkeypatch.chdir(tmp_path / name)
    save_version(".", 3)
    assert version_in(tmp_path / name) == 3
    assert os.listdir(tmp_path) == [name]


def test_a_disk_without_room_is_told_by_the_directory_and_by_no_other_name(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, before[1])
    )  # shows, as a full disk, when room is made
    told = pytest.raises(OSError, match=r"File too large while writing to .*/ckpt; .* stays$")
    try:
        with told, transaction(tmp_path / "ckpt") as save:
            save.write_tensors({"large": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_a_directory_may_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "latest").symlink_to("real")
    for version in (1, 2):
        save_version(tmp_path / "latest", version)
        assert version_in(tmp_path / "real") == version
    assert (tmp_path / "latest").is_symlink()


def test_the_working_directory_stays_a_place_to_work_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ckpt" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "ckpt" / "sub")
    for version in (1, 2):
        save_version("..", version)
    assert version_in(Path("..")) == 2


def test_the_working_directory_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    for version in (1, 2):
        save_version(tmp_path / "ckpt", version)
        assert version_in(tmp_path / "ckpt") == version


def test_what_others_add_while_a_save_is_published_is_not_lost(tmp_path: Path) -> None:
    ckpt = tmp_path / "ckpt"
    save_version(ckpt, 1)
    (ckpt / "log.txt").write_text("old")

    class Storage(LocalStorage):
        def exchange(self, first: Any, second: Any) -> None:
            if not (ckpt / "late.txt").exists():
                (ckpt / "late.txt").write_text("late")
                (ckpt / "new.txt").write_text("replaced")
                (ckpt / "new.txt").rename(ckpt / "log.txt")
            super().exchange(first, second)

    save_version(ckpt, 2, storage=Storage())
    assert version_in(ckpt) == 2
    assert (ckpt / "late.txt").read_text() == "late"
    assert (ckpt / "log.txt").read_text() == "replaced"


def test_a_directory_with_things_that_cannot_be_linked_changes_name_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ckpt = tmp_path / "ckpt"
    save_version(ckpt, 1)
    os.mkfifo(ckpt / "pipe")
    inode = os.stat(ckpt).st_ino
    save_version(ckpt, 2)
    assert version_in(ckpt) == 2
    assert os.stat(ckpt).st_ino == inode
    assert (ckpt / "pipe").exists()
    assert "neither a file nor a link" in caplog.text


def test_names_of_shards_never_come_back_where_names_change_one_by_one(tmp_path: Path) -> None:
    seen: set[str] = set()
    for version in range(4):
        save_version(tmp_path / "ckpt", version, storage=NoExchange())
        shards = {path.name for path in (tmp_path / "ckpt").glob("model-*.safetensors")}
        assert len(shards) == 3
        assert not shards & seen
        seen |= shards
    assert "model-00001-of-00003.safetensors" in seen, "the first save has the usual names"


def test_names_of_shards_can_be_unique_to_each_save(tmp_path: Path) -> None:
    seen: set[str] = set()
    for version in range(3):
        save_version(tmp_path / "ckpt", version, unique_names=True)
        assert version_in(tmp_path / "ckpt") == version
        shards = {path.name for path in (tmp_path / "ckpt").glob("model-*-of-00003.safetensors")}
        assert len(shards) == 3
        assert not shards & seen
        seen |= shards


def test_without_syncs_nothing_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:
        raise AssertionError("fsync")

    monkeypatch.setattr(os, "fsync", refuse)
    for version in (1, 2):
        save_version(tmp_path / "ckpt", version, durable=False)
    assert version_in(tmp_path / "ckpt") == 2


def test_files_and_directories_are_on_the_disk_before_the_names_change(tmp_path: Path) -> None:
    save_version(tmp_path / "ckpt", 1)
    storage = WatchedStorage()
    save_version(tmp_path / "ckpt", 2, storage=storage)
    step = storage.log.index("exchange")
    assert storage.log[:step].count("sync") == 5
    assert "sync_directory" in storage.log[:step]
    assert "sync_directory" in storage.log[step:]
    assert "write" not in storage.log[step:]
    assert storage.log[step:].index("sync_directory") < storage.log[step:].index("unlink")


# Refusals -----------------------------------------------------------------------------------------------


def test_an_error_inside_leaves_everything_as_it_was(tmp_path: Path, options: dict[str, Any]) -> None:
    save_version(tmp_path / "ckpt", 1, **options)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}

    def save_and_raise(error: BaseException) -> None:
        with transaction(tmp_path / "ckpt", **options) as save:
            fill(save, 2)
            raise error

    for error in (ValueError("no"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught:
            save_and_raise(error)
        assert caught.value is error
        assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before
        assert len(os.listdir(tmp_path)) == 1


def test_an_error_of_the_system_says_what_became_of_the_checkpoint(tmp_path: Path) -> None:
    error = "Permission denied while writing to .*; nothing was published, what was there stays: 'x'"
    with pytest.raises(PermissionError, match=error), transaction(tmp_path / "ckpt"):
        raise PermissionError(13, "Permission denied", "x")
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ckpt").write_text("a file")
    with pytest.raises(CheckpointError, match="expected a directory, found a file"):
        save_version(tmp_path / "ckpt", 1)
    with pytest.raises(OSError, match="Not a directory"):
        save_version(tmp_path / "ckpt" / "below", 1)
    assert (tmp_path / "ckpt").read_text() == "a file"
    assert len(os.listdir(tmp_path)) == 1


def test_the_root_of_the_file_system_is_refused() -> None:
    with pytest.raises(CheckpointError, match="it is the root of the file system"):
        save_version("/", 1)


@pytest.mark.parametrize("place", ["s3://bucket/run", "hf://org/name", "memory://run", Path("gs://b/run")])
def test_a_url_is_refused_and_not_taken_for_a_directory_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r":/.*expected a local path, found a URL; what is saved goes to a local"
    ):
        save_version(place, 1)
    with pytest.raises(ConfigError, match=r"'' is no path; '\.' is the working directory"):
        save_version("", 1)
    assert os.listdir(tmp_path) == []


def test_a_save_goes_where_a_load_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for version, place in enumerate(["~/ckpt", f"file://{tmp_path}/ckpt", f"file://{tmp_path}/a%20b"]):
        save_version(place, version)
        assert float(open_checkpoint(place).read(["scale"])["scale"]) == version
    assert sorted(os.listdir(tmp_path)) == ["a b", "ckpt"]
    assert rebuild_index("~/ckpt")


def test_a_directory_that_is_write_protected_is_named_and_nothing_is_left_beside_it() -> None:
    with unprivileged(), TemporaryDirectory() as folder:
        ckpt = Path(folder) / "mine" / "ckpt"
        save_version(ckpt, 1)
        ckpt.chmod(0o555)
        with pytest.raises(PermissionError, match=f"Permission denied .*nothing was published.*'{ckpt}'"):
            save_version(ckpt, 2)
        assert os.listdir(ckpt.parent) == ["ckpt"]
        assert version_in(ckpt) == 1
        ckpt.chmod(0o755)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be somebody whom modes bind: root may write everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_overwriting_can_be_refused(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    save_version(tmp_path / "ckpt", 1, overwrite=False)
    with pytest.raises(CheckpointError, match="there is something already"):
        save_version(tmp_path / "ckpt", 2, overwrite=False)
    assert version_in(tmp_path / "ckpt") == 1
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_second_saver_is_told_of_the_first(tmp_path: Path, options: dict[str, Any]) -> None:
    text = rf"another save into .*ckpt is under way \(process {os.getpid()} on .* since .*\): wait for it"
    with transaction(tmp_path / "ckpt", **options) as save:
        fill(save, 1)
        with pytest.raises(CheckpointError, match=text):
            save_version(tmp_path / "ckpt", 2, **options)
    assert version_in(tmp_path / "ckpt") == 1
    assert len(files_in(tmp_path)) == 5


def test_names_cannot_lead_out_of_the_directory(tmp_path: Path) -> None:
    with transaction(tmp_path / "ckpt") as save:
        for name in ("../x.json", "/x.json", "a//b", ""):
            with pytest.raises(CheckpointError, match="unsafe file name"):
                save.write_json(name, {})
        with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
            save.write_file("x.bin", {})
        with pytest.raises(
            ConfigError, match=r"cannot be listed by sub/x\.json, which lies in another folder"
        ):
            save.write_file("x.safetensors", {}, index="sub/x.json")
        with pytest.raises(ConfigError, match="ask for it with manifest=True"):
            save.write_json("manifest.json", {})
        save.write_json("a.json", 1)
        with pytest.raises(CheckpointError, match=r"a\.json: written twice"):
            save.write_json("a.json", 2)
    assert files_in(tmp_path) == ["ckpt/a.json"]
    with pytest.raises(RuntimeError, match="the save that this belongs to is over"):
        save.write_json("b.json", 1)


# Ranks --------------------------------------------------------------------------------------------------


def save_together(directory: Path, version: int, world_size: int, **options: Any) -> list[Any]:
    def work(rank: ThreadRank) -> None:
        with transaction(directory, rank, **options) as save:
            fill(save, version, rank.rank, rank.world_size)

    return run_ranks(world_size, work)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_write_one_checkpoint(tmp_path: Path, options: dict[str, Any], world_size: int) -> None:
    for version in (1, 2):
        assert save_together(tmp_path / "ckpt", version, world_size, **options) == [None] * world_size
        assert version_in(tmp_path / "ckpt") == version
    assert len(list(tmp_path.iterdir())) == 1


def test_a_rank_may_have_nothing_to_save(tmp_path: Path) -> None:
    def work(rank: ThreadRank) -> None:
        with transaction(tmp_path / "ckpt", rank) as save:
            save.write_tensors({"a": torch.ones(2)} if rank.rank == 2 else {})

    assert run_ranks(3, work) == [None] * 3
    assert files_in(tmp_path / "ckpt") == ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]


def test_a_failed_rank_fails_all_ranks_alike(tmp_path: Path, options: dict[str, Any]) -> None:
    save_version(tmp_path / "ckpt", 1, **options)

    def work(rank: ThreadRank) -> None:
        with transaction(tmp_path / "ckpt", rank, **options) as save:
            fill(save, 2, rank.rank, rank.world_size)
            if rank.rank == 1:
                raise ValueError("rank 1 had a bad day")

    errors = run_ranks(3, work)
    assert [type(error) for error in errors] == [CollectiveError] * 3
    assert {str(error) for error in errors} == {str(errors[0])}
    assert "rank 1 had a bad day" in str(errors[0])
    assert version_in(tmp_path / "ckpt") == 1
    assert len(files_in(tmp_path)) == 5


def test_an_interrupt_of_one_rank_ends_the_others_too(tmp_path: Path) -> None:
    def work(rank: ThreadRank) -> None:
        with transaction(tmp_path / "ckpt", rank) as save:
            fill(save, 2, rank.rank, rank.world_size)
            if rank.rank == 1:
                raise KeyboardInterrupt

    assert [type(error) for error in run_ranks(3, work)] == [
        CollectiveError,
        KeyboardInterrupt,
        CollectiveError,
    ]
    assert os.listdir(tmp_path) == []


def test_a_tensor_of_two_ranks_is_refused(tmp_path: Path) -> None:
    def work(rank: ThreadRank) -> None:
        with transaction(tmp_path / "ckpt", rank) as save:
            save.write_tensors({f"model.layers.{i}.w": torch.zeros(1) for i in (rank.rank, rank.rank + 1)})

    for error in run_ranks(3, work):
        assert isinstance(error, CollectiveError)
        assert (
            "model.layers.1.w by ranks 0-1; model.layers.2.w by ranks 1-2; expected one rank for each"
            in str(error)
        )
    assert os.listdir(tmp_path) == []


def test_a_tensor_of_no_rank_is_missed(tmp_path: Path) -> None:
    def work(rank: ThreadRank, expected: int) -> None:
        with transaction(tmp_path / "ckpt", rank) as save:
            save.expect(f"model.layers.{i}.w" for i in range(expected))
            save.write_tensors({f"model.layers.{rank.rank}.w": torch.zeros(1)})

    for error in run_ranks(2, lambda rank: work(rank, 4)):
        assert r"2 tensors were written by no rank: model.layers.{2-3}.w" in str(error)
    for error in run_ranks(2, lambda rank: work(rank, 1)):
        assert r"model.safetensors.index.json: 1 tensors were not expected: model.layers.1.w" in str(error)
    assert run_ranks(2, lambda rank: work(rank, 2)) == [None, None]


def test_ranks_must_say_the_same_in_an_index(tmp_path: Path) -> None:
    def work(rank: ThreadRank, said: list[int]) -> None:
        with transaction(tmp_path / "ckpt", rank) as save:
            save.write_tensors({str(rank.rank): torch.zeros(1)}, index_metadata={"step": said[rank.rank]})

    for error in run_ranks(3, lambda rank: work(rank, [7, 7, 8])):
        assert "the ranks disagree on its 'step': 7 before rank 2, 8 there" in str(error)
    assert run_ranks(3, lambda rank: work(rank, [7, 7, 7])) == [None] * 3
    index = json.loads((tmp_path / "ckpt" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"step": 7, "total_size": 12}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_tensors_on_any_ranks_in_shards_of_any_size_come_back(
    tmp_path: Path, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, 4))
    names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(
        lambda s: s != "__metadata__"
    )
    shapes = data.draw(st.dictionaries(names, st.lists(st.integers(0, 5), max_size=3), max_size=12))
    tensors = {name: torch.rand(shape) for name, shape in shapes.items()}
    owners = {name: data.draw(st.integers(0, world_size - 1)) for name in tensors}
    limit = data.draw(st.none() | st.integers(1, 300))
    options = data.draw(st.sampled_from([{}, {"storage": NoExchange(durable=False)}, {"unique_names": True}]))

    def work(rank: ThreadRank) -> None:
        mine = {name: tensor for name, tensor in tensors.items() if owners[name] == rank.rank}
        with transaction(tmp_path / "ckpt", rank, **{"durable": False, **options}) as save:
            save.write_tensors(mine, max_shard_size=limit)
            save.expect(mine)

    assert run_ranks(world_size, work) == [None] * world_size
    reader = open_checkpoint(tmp_path / "ckpt")
    read = reader.read()
    reader.close()
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert os.listdir(tmp_path) == ["ckpt"]
    assert verify(tmp_path / "ckpt")


def test_a_file_of_two_ranks_is_refused(tmp_path: Path) -> None:
    def work(rank: ThreadRank) -> None:
        with transaction(tmp_path / "ckpt", rank) as save:
            if rank.rank == 1:
                threading.Event().wait(0.1)
            save.write_json("config.json", {"rank": rank.rank})

    for error in run_ranks(2, work):
        assert "config.json: written twice in one save, by this rank or by another one" in str(error)
    assert os.listdir(tmp_path) == []


def test_ranks_that_disagree_on_the_plan_write_nothing(tmp_path: Path) -> None:
    def work(rank: ThreadRank) -> None:
        with transaction(tmp_path / "ckpt", rank, plan={"step": 100 if rank.rank < 2 else 200}):
            raise AssertionError("never comes here")

    for error in run_ranks(4, work):
        assert isinstance(error, ConfigError)
        assert "the ranks disagree on `plan`: {'step': 100} on rank 0-1; {'step': 200} on rank 2-3" in str(
            error
        )
    assert os.listdir(tmp_path) == []


def test_a_difference_far_behind_in_a_long_plan_is_one(tmp_path: Path) -> None:
    def work(rank: ThreadRank) -> None:
        with transaction(tmp_path / "ckpt", rank, plan=["x"] * 1000 + [rank.rank]):
            raise AssertionError("never comes here")

    assert all("the ranks disagree on `plan`" in str(error) for error in run_ranks(2, work))


def test_ranks_that_save_to_different_directories_write_nothing(tmp_path: Path) -> None:
    def work(rank: ThreadRank) -> None:
        with transaction(tmp_path / f"ckpt{rank.rank}", rank):
            raise AssertionError("never comes here")

    for error in run_ranks(2, work):
        assert "rank 1 does not see what rank 0 has made at" in str(error)
        assert "all ranks must save to the same directory, on a file system that they share" in str(error)
    assert os.listdir(tmp_path) == []


def test_ranks_that_share_no_file_system_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "VISIBLE_WITHIN", 0.2)

    class Elsewhere(LocalStorage):
        """Another machine, whose disk is not that of rank 0."""

        def read(self, path: Any) -> bytes:
            raise FileNotFoundError(2, "No such file or directory", path)

    def work(rank: ThreadRank) -> None:
        with transaction(tmp_path / "ckpt", rank, storage=Elsewhere() if rank.rank else None):
            raise AssertionError("never comes here")

    for error in run_ranks(2, work):
        assert "on a file system that they share" in str(error)
    assert os.listdir(tmp_path) == []
