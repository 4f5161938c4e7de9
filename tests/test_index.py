from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.raw_files import write_checkpoint, write_index, write_tensors

from patchers.errors import CheckpointError, CheckpointNotFoundError, MissingKeysError
from sharded_ckpt.checkpoint.index import (
    INDEX_FILE,
    MAX_INDEX_BYTES,
    CheckpointIndex,
    open_index,
    parse_index,
)
from sharded_ckpt.checkpoint.index_json import _parse_usual, parse_index_json
from sharded_ckpt.checkpoint.reader import CheckpointReader, open_checkpoint
from sharded_ckpt.checkpoint.source import open_source
from sharded_ckpt.checkpoint.strict_json import parse_json

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
KEYS = {f"model.layers.{i}.mlp.up_proj.weight": bytes([i]) * 8 for i in range(4)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys = list(KEYS.items())
    return write_checkpoint(tmp_path / "ckpt", {ONE: dict(keys[:2]), TWO: dict(keys[2:])})


def index_of(folder: Path) -> CheckpointIndex:
    return open_index(open_source(folder))


def refusal(folder: Path, kind: type[CheckpointError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        index_of(folder)
    return str(caught.value)


def test_an_index_says_which_file_holds_what(folder: Path) -> None:
    index = index_of(folder)
    assert len(index) == 4
    assert "model.layers.0.mlp.up_proj.weight" in index
    assert "model.norm.weight" not in index
    assert list(index) == list(index.keys()) == list(KEYS)
    assert index.files == (ONE, TWO)
    assert index.total_size == 32
    assert index.by_file(reversed(list(KEYS)[1:])) == {ONE: [list(KEYS)[1]], TWO: list(KEYS)[:1:-1]}


def test_keys_that_are_not_there_are_named_with_what_is_similar(folder: Path) -> None:
    with pytest.raises(MissingKeysError) as caught:
        index_of(folder).by_file(
            ["layers.1.mlp.up_proj.weight", *(f"model.layers.{i}.norm" for i in (5, 6, 7))]
        )
    text = str(caught.value)
    assert text.startswith(f"{folder}: 4 of the tensors asked for are not in the checkpoint: ")
    assert "model.layers.{5-7}.norm" in text
    assert "the checkpoint has model.layers.1.mlp.up_proj.weight" in text


def test_a_single_file_is_a_checkpoint(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", KEYS)
    index = index_of(tmp_path)
    assert index.files == ("model.safetensors",)
    assert list(index) == list(KEYS)
    assert index.total_size == 32


def test_a_file_in_a_subfolder_is_fine(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {f"subblocks/{ONE}": KEYS})
    assert index_of(tmp_path).files == (f"subblocks/{ONE}",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense", "not valid JSON"),
        ("[]", "expected an object with an object `weight_map`"),
        ("{}", "expected an object with an object `weight_map`"),
        ('{"weight_map": ["a"]}', "expected an object with an object `weight_map`"),
        ('{"weight_map": {"a": 5}}', "the file of a must be a string, found 5"),
        ('{"weight_map": {"a": ["b"]}}', "the file of a must be a string, found ['b']"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "'a' is given twice"),
        ('{"weight_map": {}, "metadata": []}', None),
        ('{"weight_map": {}, "metadata": [5]}', "`metadata` must be an object, found [5]"),
        ('{"weight_map":' + "[" * 200_000 + "]" * 200_000 + "}", "JSON nested too deep"),
        ("version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
    ],
)
def test_a_broken_index_is_refused_by_name(tmp_path: Path, text: str, reason: str | None) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    if reason is None:
        assert len(index_of(tmp_path)) == 0
    else:
        assert refusal(tmp_path).startswith(f"{tmp_path}/{INDEX_FILE}: ")
        assert reason in refusal(tmp_path)


def test_an_index_without_metadata_is_fine(tmp_path: Path) -> None:
    write_tensors(tmp_path / ONE, KEYS)
    write_index(tmp_path, dict.fromkeys(KEYS, ONE))
    assert index_of(tmp_path).total_size is None


def test_a_huge_index_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / INDEX_FILE, "wb") as file:
        file.truncate(MAX_INDEX_BYTES + 1)
    started = time.perf_counter()
    assert "bytes are too many for an index" in refusal(tmp_path)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../secret.safetensors",
            "a/../../secret.safetensors",
            "/etc/secret.safetensors",
            "",
            ".",
            "..",
            "a/",
        ),
        *("a//b", "./a", "C:\\x.safetensors", "C:x", "a\\b", "a\0b"),
    ],
)
def test_a_name_that_leads_out_of_the_checkpoint_is_refused_before_anything_is_opened(
    tmp_path: Path, name: str
) -> None:
    write_tensors(tmp_path / "secret.safetensors", KEYS)
    write_index(tmp_path / "ckpt", {"a": name})
    assert f"unsafe file name {name!r}" in refusal(tmp_path / "ckpt")


def test_missing_shards_name_files_and_keys(folder: Path) -> None:
    (folder / ONE).unlink()
    (folder / TWO).unlink()
    with pytest.raises(CheckpointNotFoundError) as caught:
        CheckpointReader(open_source(folder), index_of(folder)).headers()
    text = str(caught.value)
    assert "2 of the 2 files needed do not exist" in text
    assert f"{ONE} (2 tensors: model.layers.{{0-1}}.mlp.up_proj.weight)" in text
    assert f"{TWO} (2 tensors: model.layers.{{2-3}}.mlp.up_proj.weight)" in text


def test_a_shard_whose_name_differs_in_case_is_pointed_at(folder: Path) -> None:
    (folder / ONE).rename(folder / ONE.upper())
    with pytest.raises(CheckpointNotFoundError, match=f"names differ in case from {ONE.upper()}"):
        open_checkpoint(folder, list)


def test_names_that_differ_only_in_case_are_different_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a.safetensors": {"x": b"1"}, "A.safetensors": {"y": b"2"}})
    entries = open_checkpoint(tmp_path, list).headers()
    assert set(entries) == {"x", "y"}


def test_a_rank_needs_only_the_files_that_hold_its_keys(folder: Path) -> None:
    (folder / TWO).unlink()
    wanted = list(KEYS)[:2]
    assert list(CheckpointReader(open_source(folder), index_of(folder)).headers(wanted)) == wanted


def test_a_key_that_its_shard_does_not_hold_is_an_error_with_both_names(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["model.ghost.weight"] = ONE
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, list)
    assert f"{ONE}: the index {INDEX_FILE} says that this file holds model.ghost.weight" in str(caught.value)
    assert len(open_checkpoint(folder, lambda _: KEYS).headers(KEYS)) == 4


def test_a_key_that_the_index_does_not_know_is_reported_not_fatal(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    del index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    del index["metadata"]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with caplog.at_level(logging.WARNING):
        assert len(open_checkpoint(folder, list).headers()) == 3
    assert f"{folder}/{ONE}: the index does not name this file for 1 of its tensors" in caplog.text
    assert "model.layers.0.mlp.up_proj.weight" in caplog.text


def test_the_index_decides_between_two_shards_with_the_same_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, {ONE: {"x": b"1", "y": b"1"}, TWO: {"x": b"22", "z": b"2"}})
    write_index(tmp_path, {"x": ONE, "y": ONE, "z": TWO})
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(tmp_path, list).headers()["x"].nbytes == 1
    assert (
        f"{TWO}: the index does not name this file for 1 of its tensors, which are ignored: x" in caplog.text
    )


def test_a_stale_shard_that_the_index_does_not_name_is_not_opened(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"broken")
    assert len(open_checkpoint(folder, list).headers()) == 4


def test_a_wrong_total_size_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["metadata"]["total_size"] = 33
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with caplog.at_level(logging.WARNING):
        open_checkpoint(folder, list)
    assert "total_size is 33 bytes, the tensors have 32" in caplog.text


def test_a_right_total_size_is_not_worth_a_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_checkpoint(folder, list)
    assert caplog.text == ""


class TestSingleFileBesideAnIndex:
    def test_is_fine_if_identical(self, folder: Path) -> None:
        write_tensors(folder / "model.safetensors", dict(reversed(KEYS.items())), format="pt")
        assert index_of(folder).files == (ONE, TWO)

    @pytest.mark.parametrize(
        ("single", "reason"),
        [
            (
                {"x": b"1"},
                "only model.safetensors has x; only the index has model.layers.{0-3}.mlp.up_proj.weight",
            ),
            ({key: data[:4] for key, data in KEYS.items()}, "dtypes or shapes differ: model.layers.{0-3}"),
            (
                {**KEYS, "model.layers.2.mlp.up_proj.weight": bytes(8)},
                "values differ: model.layers.2.mlp.up_proj",
            ),
        ],
    )
    def test_is_refused_if_anything_differs(
        self, folder: Path, single: dict[str, bytes], reason: str
    ) -> None:
        write_tensors(folder / "model.safetensors", single)
        text = refusal(folder)
        assert f"{INDEX_FILE} and model.safetensors are two different checkpoints" in text
        assert reason in text
        assert "delete the stale one" in text

    def test_is_refused_if_it_cannot_be_compared(self, folder: Path) -> None:
        write_tensors(folder / "model.safetensors", KEYS)
        (folder / TWO).unlink()
        assert f"{TWO} is not there to be compared" in refusal(folder)

    def test_can_be_told_apart_by_path(self, folder: Path) -> None:
        write_tensors(folder / "model.safetensors", {"x": b"1"})
        assert list(index_of(folder / "model.safetensors")) == ["x"]
        assert list(index_of(folder / INDEX_FILE)) == list(KEYS)

    def test_may_be_the_file_that_the_index_names(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, {"model.safetensors": KEYS})
        assert index_of(tmp_path).file == INDEX_FILE


class TestUnusualNames:
    def test_the_only_other_index_is_used(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "m.safetensors", KEYS)
        write_index(tmp_path, dict.fromkeys(KEYS, "m.safetensors"), name="student.safetensors.index.json")
        assert index_of(tmp_path).file == "student.safetensors.index.json"

    def test_two_other_indexes_are_ambiguous(self, tmp_path: Path) -> None:
        for name in ("a.safetensors.index.json", "b.safetensors.index.json"):
            write_index(tmp_path, {}, name=name)
        text = refusal(tmp_path)
        assert (
            "several checkpoints are in one place: a.safetensors.index.json, b.safetensors.index.json" in text
        )
        assert "give the path of the one that is meant" in text

    def test_the_usual_index_wins_over_another(self, folder: Path) -> None:
        write_index(folder, {}, name="model.fp16.safetensors.index.json")
        assert index_of(folder).file == INDEX_FILE

    def test_the_only_other_file_is_used(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "student.safetensors", KEYS)
        assert index_of(tmp_path).files == ("student.safetensors",)

    def test_two_other_files_are_ambiguous(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "a.safetensors", KEYS)
        write_tensors(tmp_path / "b.safetensors", {"x": b""})
        assert "several checkpoints are in one place: a.safetensors, b.safetensors" in refusal(tmp_path)

    def test_a_complete_set_without_an_index_is_used(self, folder: Path) -> None:
        (folder / INDEX_FILE).unlink()
        index = index_of(folder)
        assert (index.files, index.total_size, index.file) == ((ONE, TWO), 32, None)

    def test_an_incomplete_set_without_an_index_is_refused(self, folder: Path) -> None:
        (folder / INDEX_FILE).unlink()
        (folder / ONE).unlink()
        text = refusal(folder, CheckpointNotFoundError)
        assert "no index, and only 1 of the 2 shards model-*-of-00002.safetensors" in text

    def test_a_set_without_an_index_that_holds_a_key_twice_is_refused(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / ONE, {"x": b"1"})
        write_tensors(tmp_path / TWO, {"x": b"2"})
        assert f"{ONE} and {TWO} hold the same tensors: x" in refusal(tmp_path)

    def test_pickles_are_refused_with_the_way_out(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
        text = refusal(tmp_path)
        assert "only pickle files (pytorch_model.bin), which can run code" in text
        assert (
            "convert the checkpoint to safetensors, or ask for them to be read with allow_pickle=True" in text
        )

    def test_an_index_of_pickles_is_refused(self, tmp_path: Path) -> None:
        write_index(tmp_path, {"a": "pytorch_model.bin"})
        assert "only pickle files (pytorch_model.bin)" in refusal(tmp_path)

    def test_a_folder_without_a_checkpoint_says_what_is_in_it(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        text = refusal(tmp_path, CheckpointNotFoundError)
        assert f"expected {INDEX_FILE} or model.safetensors, found notes.txt" in text


class TestWhatIsNoRegularFile:
    def test_a_link_to_a_regular_file_is_fine_as_in_the_cache_of_the_hub(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "blobs", {"0": KEYS})
        snapshot = tmp_path / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to("../../blobs/0")
        assert len(open_checkpoint(snapshot, list).headers()) == 4

    @pytest.mark.parametrize("kind", ["fifo", "directory", "device", "dangling", "loop"])
    def test_is_refused_without_hanging(self, tmp_path: Path, kind: str) -> None:
        write_index(tmp_path, {"a": "shard.safetensors"})
        path = tmp_path / "shard.safetensors"
        make = {
            "fifo": lambda: os.mkfifo(path),
            "directory": path.mkdir,
            "device": lambda: path.symlink_to("/dev/zero"),
            "dangling": lambda: path.symlink_to("gone"),
            "loop": lambda: path.symlink_to(path),
        }
        make[kind]()
        started = time.perf_counter()
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path, list)
        assert time.perf_counter() - started < 5
        reason = {
            "fifo": "expected a regular file, found a FIFO",
            "directory": "expected a regular file, found a directory",
            "device": "expected a regular file, found a device",
            "dangling": "a symbolic link to gone, which does not exist",
            "loop": "cannot be read: Too many levels of symbolic links",
        }
        assert str(caught.value) == f"{path}: {reason[kind]}"


names = st.text(st.sampled_from('ab.7é "\\\n\t{}:,'), max_size=6) | st.sampled_from(
    ["weight_map", "metadata"]
)
usual = st.dictionaries(st.text(st.sampled_from("ab.7é {}:,"), max_size=6), st.sampled_from([ONE, TWO, "{}"]))
metadata = st.dictionaries(names, st.integers() | names | st.just({"weight_map": {}}), max_size=2)


@st.composite
def written_indexes(draw: st.DrawFn) -> bytes:
    top = {"metadata": draw(metadata), "weight_map": draw(usual | st.dictionaries(names, names))}
    form = {"indent": draw(st.sampled_from([None, None, 1, 2, "\t"])), "sort_keys": draw(st.booleans())}
    text = json.dumps(top if draw(st.booleans()) else dict(reversed(top.items())), ensure_ascii=False, **form)
    begin, removed = draw(st.integers(0, len(text))), draw(st.integers(0, 3))
    added = draw(
        st.sampled_from(["", "", '"', ",", ", ", "\n", "\\", "}", "\x00", "\xa0", '"a": "b", ', "{}"])
    )
    return (text[:begin] + added + text[begin + removed :]).encode()


@settings(max_examples=500, deadline=None)
@given(written_indexes())
def test_the_fast_way_through_an_index_says_what_the_slow_one_says(raw: bytes) -> None:
    def outcome(parse: Callable[[bytes, str], Any]) -> str:
        try:
            return json.dumps(parse(raw, "c/i.json"))  # the order of the entries counts, too
        except CheckpointError as error:
            return str(error)

    assert outcome(parse_index_json) == outcome(parse_json)


@pytest.mark.parametrize("indent", [None, 2])
def test_an_index_as_others_write_it_takes_the_fast_way(indent: int | None) -> None:
    top = {"metadata": {"total_size": 8}, "weight_map": {"a": ONE, "b": ONE, "c": TWO}}
    raw = json.dumps(top, indent=indent, sort_keys=True).encode() + b"\n"
    assert _parse_usual(raw, "c/i.json") == top


def test_ten_thousand_shards_and_two_hundred_thousand_keys_take_a_second() -> None:
    files = [f"model-{i:05d}-of-10000.safetensors" for i in range(10_000)]
    weight_map = {f"model.layers.{i}.mlp.experts.7.up_proj.weight": files[i % 10_000] for i in range(200_000)}
    raw = json.dumps({"weight_map": weight_map}).encode()
    started = time.process_time()
    index = parse_index(raw, location="ckpt", file=INDEX_FILE)
    groups = index.by_file(list(weight_map)[::2])
    assert time.process_time() - started < 2
    assert len(index.files) == 10_000
    assert sum(map(len, groups.values())) == 100_000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
indexes = st.fixed_dictionaries(
    {},
    optional={
        "weight_map": json_values | st.dictionaries(st.text(max_size=6), st.text(max_size=8) | json_values),
        "metadata": json_values | st.dictionaries(st.just("total_size"), json_values),
    },
)


@settings(max_examples=300, deadline=None)
@given(indexes | json_values, st.integers(0, 200), st.sampled_from([None, b"", b"x", b'"', b"\xff"]))
def test_a_mutated_index_gives_an_index_or_an_error_of_ours(
    top: object, place: int, patch: bytes | None
) -> None:
    raw = json.dumps(top).encode()
    if patch is not None:
        raw = raw[:place] + patch + raw[place + 1 :]
    try:
        index = parse_index(raw, location="ckpt", file=INDEX_FILE)
    except CheckpointError as error:
        text = str(error)
    else:
        text = f"ckpt {len(index.files)} {index.total_size}"
        assert all(isinstance(name, str) and ".." not in name.split("/") for name in index.files)
    assert text.startswith("ckpt")
