"""Tensors reach the file bit by bit, whatever they are, in a file that everybody reads."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import threading
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.storages import FaultyStorage, WatchedStorage

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt.checkpoint import layout, pieces
from sharded_ckpt.checkpoint.header import read_header
from sharded_ckpt.checkpoint.layout import plan_file, plan_shards
from sharded_ckpt.checkpoint.storage import LocalStorage
from sharded_ckpt.checkpoint.writer import DTYPE_NAMES, LazyTensor, aliases, write_tensors

DTYPES = [getattr(torch, name.split(".")[1]) for name in DTYPE_NAMES if name != "torch.float4_e2m1fn_x2"]
UNREAD_BY_SAFETENSORS = {torch.float8_e8m0fnu}  # its torch bindings write this one, but cannot read it


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    count = math.prod(shape)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def parsed(path: Path):
    data = path.read_bytes()
    return read_header(lambda begin, end: data[begin:end], len(data), str(path))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_written_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": random_tensor(dtype, 3, 5),
        "empty": random_tensor(dtype, 0, 3),
        "scalar": random_tensor(dtype),
    }
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors)
    data, header = path.read_bytes(), parsed(path)
    for name, tensor in tensors.items():
        entry = header.tensors[name]
        assert entry.shape == tuple(tensor.shape)
        assert data[entry.begin : entry.end] == raw(tensor)
    if dtype not in UNREAD_BY_SAFETENSORS:
        read = load_file(path)
        assert all(read[name].dtype == dtype and raw(read[name]) == raw(tensors[name]) for name in tensors)


def test_a_packed_dtype_counts_its_elements_as_safetensors_does(tmp_path: Path) -> None:
    packed = random_tensor(torch.uint8, 2, 4).view(torch.float4_e2m1fn_x2)
    write_tensors(tmp_path / "x.safetensors", {"a": packed})
    entry = parsed(tmp_path / "x.safetensors").tensors["a"]
    assert (entry.dtype, entry.shape, entry.nbytes) == ("F4", (2, 8), 8)


def test_tensors_that_are_not_plain_memory_are_written_as_they_read(tmp_path: Path) -> None:
    base, wave = torch.randn(6, 5, 4), torch.randn(4, 3, dtype=torch.complex64)
    tensors = {
        "transposed": base.transpose(0, 2),
        "strided": base[::2, 1:, ::3],
        "expanded": torch.randn(1, 4).expand(3, 4),
        "conjugate": wave.conj(),
        "negative": wave.conj().imag,
        "view of one storage": base[1],
        "grad": torch.nn.Parameter(torch.randn(2, 2)),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert list(read)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_large_strided_tensors_pass_through_a_small_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "STAGING_BYTES", 1 << 12)
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 3 << 12)
    tensors = {
        "rows": torch.randn(300, 70).T,
        "long rows": torch.randn(4000, 3).T,
        "deep": torch.randn(2, 3, 1500, 2).transpose(2, 3),
        "plain": torch.randn(5000),
        **{f"small {i}": torch.randn(i, 3).T for i in range(40)},
    }
    done = write_tensors(tmp_path / "x.safetensors", tensors, digest=True)
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert done.sha256 == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()


def test_many_small_tensors_share_writes(tmp_path: Path) -> None:
    storage = WatchedStorage()
    tensors = {f"t{i}": torch.full((3,), float(i)) for i in range(2500)}
    write_tensors(tmp_path / "x.safetensors", tensors, storage=storage)
    assert storage.log.count("write") == 3  # at most 1024 buffers each
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("durable", [False, True])
def test_a_few_threads_write_large_files(tmp_path: Path, durable: bool) -> None:
    threads, bypasses = set(), []

    class Storage(WatchedStorage):
        def before(self, number: int, operation: str) -> None:
            if operation == "write":
                threads.add(threading.current_thread().name)

        def bypass_cache(self, fd: int) -> bool:
            bypasses.append(super().bypass_cache(fd))
            return bypasses[-1]

    tensors = {f"t{i}": torch.randn(3 << 20) for i in range(6)}
    storage = Storage(durable=durable)
    done = write_tensors(tmp_path / "x.safetensors", tensors, storage=storage, digest=True)
    assert len(threads) == (3 if any(bypasses) else 2)
    assert all(name.startswith("write-tensors") for name in threads)
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert done.sha256 == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert done.file_size == os.path.getsize(tmp_path / "x.safetensors")
    assert done.tensors["t0"] == 12 << 20


@pytest.mark.parametrize("way", ["past the page cache", "not durable", "no such way", "refused later"])
def test_large_files_are_the_same_whichever_way_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    class Storage(WatchedStorage):
        def bypass_cache(self, fd: int) -> bool:
            self._enter("bypass_cache")
            return way != "no such way" and LocalStorage.bypass_cache(self, fd)

    real = os.pwritev

    def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
        if way == "refused later" and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers[:1], offset)  # a short write is no error

    monkeypatch.setattr(os, "pwritev", pwritev)
    tensors = {
        "long": torch.randn(3 << 20),
        "strided": torch.randn(1500, 1400).T,
        **{f"small {i}": torch.randn(1001) for i in range(300)},
        "empty": torch.zeros(0),
        "odd": torch.arange(7, dtype=torch.uint8),
    }
    storage = Storage(durable=way != "not durable")
    done = write_tensors(tmp_path / "x.safetensors", tensors, storage=storage, digest=True)
    assert ("bypass_cache" in storage.log) is (way != "not durable")
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert done.sha256 == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()


def test_whatever_fails_in_writing_a_large_file_is_raised(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3 << 20), "b": torch.zeros(1001)}
    log = WatchedStorage()
    write_tensors(tmp_path / "x.safetensors", tensors, storage=log)
    assert "bypass_cache" in log.log
    for number in range(1, len(log.log) + 1):
        storage = FaultyStorage(number, OSError(5, "Input/output error"))
        with pytest.raises(OSError, match="Input/output error"):
            write_tensors(tmp_path / f"{number}.safetensors", tensors, storage=storage)


def test_an_invalid_write_that_the_page_cache_does_not_mend_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwritev", pwritev)
    with pytest.raises(OSError, match="Invalid argument"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3 << 20)})


def test_an_error_on_one_thread_stops_the_other(tmp_path: Path) -> None:
    names: list[str] = []
    tensors = {f"t{i}": torch.zeros(2 << 20) for i in range(20)}
    log = WatchedStorage()
    write_tensors(tmp_path / "all.safetensors", tensors, storage=log)
    storage = FaultyStorage(log.log.index("write") + 1, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "x.safetensors", tensors, storage=storage)
    assert storage.log.count("write") <= 4 < log.log.count("write"), names
    assert storage.log[-1] == "close"


def test_every_tensor_is_aligned_and_data_begins_with_a_page() -> None:
    plan = plan_file({"flag": ("BOOL", (3,)), "b": ("BF16", (5,)), "c": ("C64", (1,)), "f": ("F32", (1,))})
    assert list(plan.tensors) == ["c", "f", "b", "flag"]
    assert len(plan.header) % 4096 == 0
    assert all(
        entry.begin % size == 0 for entry, size in zip(plan.tensors.values(), (8, 4, 2, 1), strict=True)
    )


def test_the_order_given_is_kept_within_one_item_size() -> None:
    names = [f"model.layers.{i}.w" for i in (0, 1, 2, 10, 11)]
    assert list(plan_file({name: ("BF16", (4,)) for name in names}).tensors) == names


def test_transformers_finds_the_format_that_it_asks_for(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    assert parsed(tmp_path / "x.safetensors").metadata == {"format": "pt"}
    write_tensors(tmp_path / "y.safetensors", {"a": torch.zeros(1)}, metadata={"step": "3"})
    assert parsed(tmp_path / "y.safetensors").metadata == {"step": "3"}


def test_a_file_without_tensors_is_one(tmp_path: Path) -> None:
    assert write_tensors(tmp_path / "x.safetensors", {}).tensors == {}
    assert load_file(tmp_path / "x.safetensors") == {}


def test_what_cannot_be_saved_is_named_before_anything_is_created(tmp_path: Path) -> None:
    meta = {f"model.layers.{i}.w": torch.zeros(2, device="meta") for i in (3, 4)}
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.\{3-4\}\.w: on the meta device, without values"
    ):
        write_tensors(tmp_path / "x.safetensors", {**meta, "ok": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="s: neither dense nor plain"):
        write_tensors(tmp_path / "x.safetensors", {"s": torch.eye(2).to_sparse()})
    with pytest.raises(CheckpointError, match=r"c: safetensors has no torch\.complex128"):
        write_tensors(tmp_path / "x.safetensors", {"c": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(CheckpointError, match="n: a list, not a tensor"):
        write_tensors(tmp_path / "x.safetensors", {"n": [1.0]})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="u: a UninitializedParameter, which has no shape yet"):
        write_tensors(tmp_path / "x.safetensors", {"u": torch.nn.parameter.UninitializedParameter()})
    freed = torch.zeros(4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(CheckpointError, match="f: without memory, which was freed"):
        write_tensors(tmp_path / "x.safetensors", {"f": freed})
    assert os.listdir(tmp_path) == []


def test_names_and_metadata_that_no_header_can_hold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="'__metadata__' is taken"):
        write_tensors(path, {"__metadata__": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="not valid Unicode"):
        write_tensors(path, {"\ud800": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="maps strings to strings"):
        write_tensors(path, {"a": torch.zeros(1)}, metadata={"step": 3})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=r"write more files \(max_shard_size\)"):
        plan_file({"x" * 100_000_000: ("F32", (1,))})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "a/../b", 'quote " and \\', "newline\n", "ключ", "x" * 10_000])
def test_every_other_name_survives(tmp_path: Path, name: str) -> None:
    write_tensors(tmp_path / "x.safetensors", {name: torch.ones(2)})
    assert (
        list(load_file(tmp_path / "x.safetensors"))
        == [name]
        == list(parsed(tmp_path / "x.safetensors").tensors)
    )


def test_a_file_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("old")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    assert (tmp_path / "x.safetensors").read_text() == "old"


def test_lazy_tensors_are_made_one_after_the_other_and_dropped(tmp_path: Path) -> None:
    living: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    counts = []

    def make(i: int) -> torch.Tensor:
        tensor = torch.full((3 << 20,), float(i))
        living.add(tensor)
        counts.append(len(living))
        return tensor

    tensors = {f"t{i}": LazyTensor(torch.float32, (3 << 20,), lambda i=i: make(i)) for i in range(12)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert all(bool((read[f"t{i}"] == i).all()) for i in range(12))
    assert len(counts) == 12
    assert max(counts) <= 4


def test_a_lazy_tensor_must_be_what_was_announced(tmp_path: Path) -> None:
    lazy = LazyTensor(torch.float32, (2, 3), lambda: torch.zeros(3, 2))
    with pytest.raises(
        CheckpointError, match=r"a was announced as torch.float32 of shape \(2, 3\), made was .*\(3, 2\)"
    ):
        write_tensors(tmp_path / "x.safetensors", {"a": lazy})


def test_a_tensor_that_changes_its_size_meanwhile_is_noticed(tmp_path: Path) -> None:
    growing = torch.zeros(4)

    def make() -> torch.Tensor:
        growing.data = torch.zeros(5)
        return torch.zeros(1)

    tensors = {"a": LazyTensor(torch.float32, (1,), make), "b": growing}
    with pytest.raises(CheckpointError, match="the tensors have changed their sizes meanwhile"):
        write_tensors(tmp_path / "x.safetensors", tensors)


def test_aliases_are_the_same_memory_read_in_the_same_way() -> None:
    weight, other = torch.zeros(4, 4), torch.zeros(4, 4)
    named = {"embed": weight, "t": weight.T, "head": weight.detach(), "other": other, "part": weight[:2]}
    named.update(none=torch.zeros(0), nothing=torch.zeros(0), bits=weight.view(torch.int32))
    groups = aliases(named)
    assert groups[0] == ["embed", "head"]
    assert all(len(group) == 1 for group in groups[1:])
    assert sum(map(len, groups)) == len(named)


def test_shards_are_limited_by_size() -> None:
    sizes = {"a": 4, "b": 4, "c": 20, "d": 4, "e": 8}
    assert plan_shards(sizes) == [["a", "b", "c", "d", "e"]]
    assert plan_shards(sizes, 10) == [["c"], ["a", "b"], ["d"], ["e"]]
    assert plan_shards(sizes, "10") == plan_shards(sizes, 10)
    assert plan_shards(sizes, "1KB") == [["a", "b", "c", "d", "e"]]
    assert plan_shards({}) == [] == plan_shards({}, 10)
    with pytest.raises(ConfigError, match="max_shard_size '5 apples' is no size"):
        plan_shards(sizes, "5 apples")


@pytest.mark.parametrize("limit", [0, -1, float("nan"), "0", "-0", "0GB", "0.0 MB", " -5GB"])
def test_a_limit_that_no_tensor_keeps_is_refused(limit: int | str) -> None:
    with pytest.raises(ConfigError, match=f"more than 0 bytes, found {limit}"):
        plan_shards({"a": 4}, limit)


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 50), max_size=20), st.integers(1, 60))
def test_shards_hold_every_tensor_once_and_respect_the_limit(sizes: dict[str, int], limit: int) -> None:
    shards = plan_shards(sizes, limit)
    assert sorted(name for shard in shards for name in shard) == sorted(sizes)
    assert all(shard and (len(shard) == 1 or sum(sizes[name] for name in shard) <= limit) for shard in shards)


shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda s: s.isprintable()),
        st.tuples(st.sampled_from(DTYPES), shapes),
        max_size=8,
    )
)
def test_any_tensors_come_back_as_they_were(
    tmp_path: Path, specs: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    tensors = {name: random_tensor(dtype, *shape) for name, (dtype, shape) in specs.items()}
    write_tensors(path, tensors)
    data, header = path.read_bytes(), parsed(path)
    assert set(header.tensors) == set(tensors)
    for name, tensor in tensors.items():
        entry = header.tensors[name]
        assert (entry.dtype, entry.shape) == (DTYPE_NAMES[str(tensor.dtype)], tuple(tensor.shape))
        assert data[entry.begin : entry.end] == raw(tensor)
        assert entry.begin % max(tensor.dtype.itemsize, 1) == 0


def test_header_is_what_safetensors_would_write(tmp_path: Path) -> None:
    header = plan_file({"a": ("F32", (2,))}, {"format": "pt"}).header
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert json.loads(header[8:]) == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    assert layout.nbytes_of("F32", (2,)) == 8


def test_one_element_of_any_stride_is_written(tmp_path: Path) -> None:
    odd = torch.arange(6.0)[3::2][:1]
    assert odd.is_contiguous()
    assert odd.stride() == (2,)
    write_tensors(tmp_path / "a.safetensors", {"odd": odd, "matrix": torch.ones(4, 4)[::2, ::3][:1, :1]})
    assert load_file(tmp_path / "a.safetensors")["odd"].tolist() == [3.0]
