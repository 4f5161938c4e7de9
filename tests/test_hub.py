from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from support.fake_hub import COMMIT, REPO, FakeHub, serve, use_hub
from support.raw_files import write_checkpoint

from patchers.errors import CheckpointError, CheckpointNotFoundError
from sharded_ckpt.checkpoint.hub import Download, HubSource
from sharded_ckpt.checkpoint.index import open_index
from sharded_ckpt.checkpoint.reader import open_checkpoint
from sharded_ckpt.checkpoint.source import open_source, read_json

ONE, TWO = "model-00001-of-00002.safetensors", "part[2]/model-00002-of-00002.safetensors"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    folder = write_checkpoint(tmp_path / "made", {ONE: {"a": b"1" * 400_000}, TWO: {"b": b"2" * 400_000}})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")}


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub, a cache that is empty, and nothing of either in other tests."""
    with serve(FakeHub(files)) as hub:
        use_hub(hub.url, tmp_path / "cache", monkeypatch)
        yield hub
        huggingface_hub.close_session()


def test_only_the_files_that_hold_wanted_keys_are_downloaded(hub: FakeHub, files: dict[str, bytes]) -> None:
    tensors = open_checkpoint(REPO).read(["b"])
    assert bytes(tensors["b"].tolist()) == b"2" * 400_000
    assert hub.fetched[TWO] >= len(files[TWO])
    assert ONE not in hub.fetched


def test_planning_fetches_headers_and_no_tensor(hub: FakeHub) -> None:
    reader = open_checkpoint(REPO)
    assert {key: entry.nbytes for key, entry in reader.headers().items()} == {"a": 400_000, "b": 400_000}
    assert hub.fetched[ONE] <= 256 * 2**10


def test_a_plan_says_what_would_be_downloaded(
    hub: FakeHub, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(REPO)
    assert isinstance(source, HubSource)
    plan = source.downloads([ONE, TWO])
    assert plan == [Download(ONE, len(files[ONE]), False), Download(TWO, len(files[TWO]), False)]
    assert not hub.fetched
    with caplog.at_level(logging.INFO, "sharded_ckpt"):
        source.ensure([TWO])
    assert f"{REPO}: downloading 1 files, 0.00 GB" in caplog.text
    assert [download.is_cached for download in source.downloads([ONE, TWO])] == [False, True]


def test_what_is_in_the_cache_is_not_fetched_again(hub: FakeHub) -> None:
    open_checkpoint(REPO).read()
    fetched = dict(hub.fetched)
    open_checkpoint(REPO).read()
    assert hub.fetched == fetched


def test_without_a_connection_the_cache_is_used(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint(REPO).read(["b"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for reader in (open_checkpoint(REPO), open_checkpoint(REPO, local_files_only=True)):
        assert len(reader.read(["b"])["b"]) == 400_000
        with pytest.raises(CheckpointNotFoundError, match=f"1 of the 1 files needed do not exist: {ONE}"):
            reader.read(["a"])


def test_a_branch_that_moves_on_meanwhile_changes_nothing(hub: FakeHub) -> None:
    reader = open_checkpoint(REPO)
    hub.main = "f" * 40
    assert len(reader.read(["a"])["a"]) == 400_000


def test_a_commit_can_be_asked_for(hub: FakeHub) -> None:
    for where in (REPO, f"hf://{REPO}"):
        assert set(open_index(open_source(where, revision=COMMIT))) == {"a", "b"}
    assert set(open_index(open_source(f"hf://{REPO}@{COMMIT}"))) == {"a", "b"}


def test_one_file_can_be_asked_for(hub: FakeHub) -> None:
    assert set(open_index(open_source(f"hf://{REPO}/{ONE}"))) == {"a"}


def test_a_config_can_be_read(hub: FakeHub) -> None:
    source = open_source(REPO)
    assert read_json(source, "config.json") == {"model_type": "llama"}
    assert source.local_path("config.json").read_text() == '{"model_type": "llama"}'
    assert source.names() == ["config.json", ONE, "model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("where", "options", "reason"),
    [
        ("team/typo", {}, "team/typo: neither a directory here nor a repository on the hub; check the name"),
        (REPO, {"revision": "v9"}, "team/model: the repository has no revision 'v9'"),
        ("-/-", {}, "-/-: no such file or directory"),
        (REPO, {"local_files_only": True}, "nor a repository on the hub that was downloaded before"),
    ],
)
def test_what_is_not_there_is_named(
    hub: FakeHub, where: str, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(CheckpointNotFoundError) as caught:
        open_source(where, **options)  # type: ignore[arg-type]
    assert reason in str(caught.value)


def test_a_gated_repository_says_what_to_do(hub: FakeHub) -> None:
    hub.gated = True
    with pytest.raises(
        CheckpointError, match="gated: accept its terms on its page, then log in with `hf auth login`"
    ):
        open_checkpoint(REPO)


def test_an_unreachable_hub_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub("http://127.0.0.1:1", tmp_path / "cache", monkeypatch)
    with pytest.raises(CheckpointNotFoundError, match="that can be reached or was downloaded before"):
        open_source(REPO)
    huggingface_hub.close_session()


def test_a_directory_is_never_looked_up_on_the_hub(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "team/model", {ONE: {"local": b"1"}})
    assert set(open_index(open_source(REPO))) == {"local"}
    with pytest.raises(
        CheckpointNotFoundError, match=r"team/modle: no such file or directory; did you mean team/model\?"
    ):
        open_source("team/modle")
    assert not hub.fetched
