from __future__ import annotations

import os
import socket
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.raw_files import write_checkpoint, write_tensors

from patchers.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from sharded_ckpt.checkpoint.index import open_index
from sharded_ckpt.checkpoint.local import LocalSource
from sharded_ckpt.checkpoint.pickle_source import read_pickle_shards
from sharded_ckpt.checkpoint.reader import CheckpointReader, open_checkpoint
from sharded_ckpt.checkpoint.remote import RemoteSource
from sharded_ckpt.checkpoint.source import TensorSource, check_name, open_source, read_json

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "ckpt", {ONE: {"a": b"1" * 50}, TWO: {"b": b"2" * 50}})


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection in this module fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class TestWhere:
    def test_a_directory_is_one_as_text_or_path(self, folder: Path) -> None:
        for where in (folder, str(folder), f"{folder}/", f"file://{folder}"):
            source = open_source(where)
            assert isinstance(source, LocalSource)
            assert isinstance(source, TensorSource)
            assert source.names() == [ONE, TWO, "model.safetensors.index.json"]

    def test_a_home_directory_is_found(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(folder.parent))
        assert set(open_index(open_source("~/ckpt"))) == {"a", "b"}

    def test_the_url_of_a_file_is_decoded(self, folder: Path) -> None:
        strange = folder.rename(folder.with_name("ü 100%"))
        for where in (strange.as_uri(), strange.as_uri().replace("file://", "file://localhost")):
            assert set(open_index(open_source(where))) == {"a", "b"}
        with pytest.raises(CheckpointNotFoundError, match=r"did you mean .*/ü 100%"):
            open_source(strange.as_uri().replace("100", "10"))

    def test_no_place_at_all_is_not_the_working_directory(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder)
        with pytest.raises(ConfigError, match=r"'' is no path; '\.' is the working directory"):
            open_source("")

    def test_a_file_stands_for_its_own_checkpoint(self, folder: Path) -> None:
        assert set(open_index(open_source(folder / ONE))) == {"a"}
        assert set(open_index(open_source(folder / "model.safetensors.index.json"))) == {"a", "b"}

    def test_the_path_that_a_save_was_given_finds_its_shards(self, folder: Path) -> None:
        assert set(open_index(open_source(folder / "model.safetensors"))) == {"a", "b"}

    def test_a_file_of_another_kind_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        with pytest.raises(CheckpointError, match="not a checkpoint; give its directory, its index"):
            open_source(tmp_path / "notes.txt")

    @pytest.mark.parametrize(
        "where", ["./gone", "gone/", "/gone", "../gone", "a/b/c", "gone.safetensors", "~/x y"]
    )
    def test_what_looks_like_a_path_is_never_a_hub_id(self, where: str) -> None:
        with pytest.raises(CheckpointNotFoundError, match="no such file or directory"):
            open_source(where)

    def test_a_path_object_is_never_a_hub_id(self) -> None:
        with pytest.raises(CheckpointNotFoundError, match="org/name: no such file or directory"):
            open_source(Path("org/name"))

    def test_a_typing_error_is_pointed_at(self, folder: Path) -> None:
        with pytest.raises(CheckpointNotFoundError) as caught:
            open_source(folder.with_name("cktp"))
        assert str(caught.value).endswith(f"did you mean {folder}?")
        with pytest.raises(CheckpointNotFoundError) as caught:
            open_source(folder / "gone" / "step_5")
        assert str(caught.value).endswith(f"{folder / 'gone'} does not exist either")


class TestLocal:
    def test_bytes_are_read_from_to(self, folder: Path) -> None:
        source, whole = open_source(folder), (folder / ONE).read_bytes()
        assert source.read_bytes(ONE) == whole
        assert source.read_bytes(ONE, 5, 9) == whole[5:9]
        assert source.read_bytes(ONE, 5, 10**9) == whole[5:]
        assert source.size(ONE) == len(whole)
        assert source.local_path(ONE) == folder / ONE

    def test_it_stays_the_directory_that_was_opened(self, folder: Path) -> None:
        source = open_source(folder)
        folder.rename(folder.with_name("old"))
        write_checkpoint(folder, {ONE: {"c": b"3"}})
        assert set(open_index(source)) == {"a", "b"}
        assert source.changed()
        assert not open_source(folder).changed()

    def test_after_a_chdir_its_paths_lead_there_still(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder.parent)
        source = open_source(folder.name)
        monkeypatch.chdir(tmp_path / "..")
        assert source.local_path(ONE).read_bytes() == source.read_bytes(ONE)
        assert not source.changed()

    def test_it_sees_that_an_index_was_replaced(self, folder: Path) -> None:
        source = open_source(folder)
        open_index(source)
        assert not source.changed()
        write_checkpoint(folder, {ONE: {"c": b"3"}})
        assert source.changed()

    def test_a_missing_file_is_named(self, folder: Path) -> None:
        source = open_source(folder)
        with pytest.raises(CheckpointNotFoundError, match=f"{folder}/gone: no such file"):
            source.size("gone")
        assert not source.exists("gone")
        assert not source.exists(f"{ONE}/gone")
        assert source.missing([ONE, "gone", TWO]) == ["gone"]

    def test_a_file_that_may_not_be_read_is_named(self, folder: Path) -> None:
        source = open_source(folder)
        (folder / ONE).chmod(0)
        user = os.geteuid()
        if user == 0:  # who may read everything
            os.seteuid(65534)
        try:
            with pytest.raises(CheckpointError, match=f"{folder}/{ONE}: cannot be read: Permission denied"):
                source.open(ONE)
        finally:
            os.seteuid(user)

    def test_json_is_read_and_bounded(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"a": 1}')
        source = open_source(folder)
        assert read_json(source, "config.json") == {"a": 1}
        with pytest.raises(CheckpointError, match=r"config.json: 8 bytes are too many for this JSON file"):
            read_json(source, "config.json", limit=7)


class TestRemote:
    """Through fsspec, on its file system in memory."""

    @pytest.fixture
    def url(self, folder: Path) -> str:
        memory = fsspec.filesystem("memory")
        for file in folder.iterdir():
            memory.pipe(f"/bucket/ckpt/{file.name}", file.read_bytes())
        return "memory://bucket/ckpt"

    @pytest.mark.parametrize("options", [{}, {"materialize": True}, {"ring": True}, {"dtype": torch.float32}])
    def test_reads_what_a_directory_would_give(
        self, url: str, folder: Path, options: dict[str, bool]
    ) -> None:
        found, expected = open_checkpoint(url).read(**options), open_checkpoint(folder).read(**options)
        assert {key: tensor.tolist() for key, tensor in found.items()} == {
            key: tensor.tolist() for key, tensor in expected.items()
        }
        assert dict(open_checkpoint(url).iter_tensors(["b"]))["b"].tolist() == [ord("2")] * 50

    def test_fetches_the_ranges_wanted_and_no_others(self, tmp_path: Path) -> None:
        large = {key: key.encode() * 10**6 for key in "abc"}
        memory = fsspec.filesystem("memory")
        memory.pipe("/large/model.safetensors", write_tensors(tmp_path / "large", large).read_bytes())
        source = Counting("memory://large")
        reader = CheckpointReader(source, open_index(source))
        assert reader.read(["b"])["b"].tolist() == [ord("b")] * 10**6
        assert source.fetched < 10**6 + 3 * 256 * 2**10

    def test_a_file_stands_for_its_own_checkpoint(self, url: str) -> None:
        assert set(open_index(open_source(f"{url}/{ONE}"))) == {"a"}

    def test_names_and_copies(self, url: str, folder: Path, tmp_path: Path) -> None:
        source = open_source(url, cache_dir=tmp_path / "copies")
        assert source.names() == [ONE, TWO, "model.safetensors.index.json"]
        assert source.local_path(ONE).is_relative_to(tmp_path / "copies")
        assert source.local_path(ONE).name == ONE
        assert source.local_path(ONE).read_bytes() == (folder / ONE).read_bytes()
        assert open_source(url).local_path(TWO).read_bytes() == (folder / TWO).read_bytes()

    def test_copies_of_several_checkpoints_in_one_cache_stay_apart(self, tmp_path: Path) -> None:
        memory = fsspec.filesystem("memory")
        for name in ("one", "other"):
            memory.pipe(f"/apart/{name}/config.json", name.encode())
        sources = [open_source(f"memory://apart/{name}", cache_dir=tmp_path) for name in ("one", "other")]
        assert [source.local_path("config.json").read_text() for source in sources] == ["one", "other"]

    def test_a_copy_is_made_once_and_again_when_the_file_has_changed(self, tmp_path: Path) -> None:
        memory = fsspec.filesystem("memory")
        memory.pipe("/anew/config.json", b"old")
        first = open_source("memory://anew", cache_dir=tmp_path).local_path("config.json")
        assert open_source("memory://anew", cache_dir=tmp_path).local_path("config.json") == first
        assert os.listdir(first.parent) == ["config.json"]
        memory.pipe("/anew/config.json", b"new")
        assert open_source("memory://anew", cache_dir=tmp_path).local_path("config.json").read_text() == "new"

    @pytest.mark.parametrize("how", ["read", "iter_tensors"])
    def test_a_file_that_is_replaced_while_it_is_read_is_refused(self, tmp_path: Path, how: str) -> None:
        memory = fsspec.filesystem("memory")
        for name, tensors in (("old", {"a": b"1", "b": b"2"}), ("new", {"b": b"3", "a": b"4"})):
            write_tensors(tmp_path / name, tensors)
        memory.pipe("/replaced/model.safetensors", (tmp_path / "old").read_bytes())
        reader = open_checkpoint("memory://replaced", lambda index: index)
        assert {key: int(value) for key, value in reader.iter_tensors()} == {"a": ord("1"), "b": ord("2")}
        memory.pipe("/replaced/model.safetensors", (tmp_path / "new").read_bytes())
        with pytest.raises(CheckpointError, match="memory://replaced: a file was changed while it was read"):
            dict(getattr(reader, how)())

    def test_what_is_not_there_is_named(self, url: str) -> None:
        with pytest.raises(CheckpointNotFoundError, match="memory://bucket/gone: no such file or folder"):
            open_source("memory://bucket/gone")
        with pytest.raises(CheckpointNotFoundError, match=f"{url}/gone.json: no such file or folder"):
            read_json(open_source(url), "gone.json")

    def test_a_protocol_that_is_not_installed_says_what_to_install(self) -> None:
        with pytest.raises(ConfigError, match=r"pip install sharded-ckpt\[remote\]"):
            open_source("nonsense://bucket/ckpt")


class TestPickles:
    def test_are_read_when_asked_for(self, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(3), "b": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
        tensors = read_pickle_shards(open_source(tmp_path), ["b"])
        assert {key: tensor.tolist() for key, tensor in tensors.items()} == {"b": [0, 0]}
        assert set(read_pickle_shards(open_source(tmp_path))) == {"a", "b"}

    def test_that_run_code_are_not_loaded(self, tmp_path: Path) -> None:
        torch.save({"a": Attack()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="holds more than tensors, which is not loaded"):
            read_pickle_shards(open_source(tmp_path))

    def test_that_are_broken_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04nonsense")
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: "):
            read_pickle_shards(open_source(tmp_path))


class Counting(RemoteSource):
    """Counts the bytes that are fetched."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.fetched = 0

    def read_bytes(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        data = super().read_bytes(name, begin, end)
        self.fetched += len(data)
        return data


class Attack:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise AssertionError('code of a pickle was run')",)


@given(st.text(st.sampled_from("ab./\\\0:C"), max_size=12))
def test_a_safe_name_stays_inside(name: str) -> None:
    try:
        check_name(name, "index")
    except CheckpointError as error:
        refusal = str(error)
    else:
        refusal = ""
        inside = Path("/checkpoint", name)
        assert inside.is_relative_to("/checkpoint")
        assert ".." not in inside.parts
        assert "\0" not in name
    assert not refusal or refusal.startswith("index: unsafe file name ")


def test_save_file_of_the_library_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.arange(5)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).read()["x"].tolist() == [0, 1, 2, 3, 4]
