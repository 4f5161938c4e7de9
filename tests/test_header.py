from __future__ import annotations

import json
import random
import resource
import time
from contextlib import suppress
from itertools import pairwise

import fuzz_header
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from support.raw_files import file_bytes, header_json

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.header import DTYPE_BITS, Header, TensorEntry, read_header
from sharded_ckpt.checkpoint.header_json import parse_any

FILE = "model-00001-of-00002.safetensors"
GOOD = header_json({"a": ("F32", [2], [0, 8]), "b": ("BF16", [2, 2], [8, 16])}, format="pt")


def read(raw: bytes) -> Header:
    return read_header(lambda begin, end: raw[begin:end], len(raw), FILE)


def refusal(raw: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(raw)
    text = str(caught.value)
    assert text.startswith(f"{FILE}: "), text
    return text


def test_header_gives_dtype_shape_and_absolute_offsets() -> None:
    header = read(file_bytes(GOOD, bytes(16)))
    begin = 8 + len(GOOD)
    assert header == Header(
        FILE,
        {
            "a": TensorEntry("F32", (2,), begin, begin + 8),
            "b": TensorEntry("BF16", (2, 2), begin + 8, begin + 16),
        },
        {"format": "pt"},
        begin,
        begin + 16,
    )
    assert header.tensors["b"].nbytes == 8


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "the file is empty"),
        (b"\0" * 7, "7 bytes are too short"),
        ((2**63).to_bytes(8, "little") + bytes(64), f"a header of {2**63} bytes"),
        ((2**40).to_bytes(8, "little") + bytes(64), f"a header of {2**40} bytes"),
        (
            file_bytes(GOOD, bytes(16), length=100_000_001),
            "a header of 100000001 bytes, the format allows 100000000",
        ),
        (
            file_bytes(GOOD, length=5000),
            f"incomplete download? expected at least 5008 bytes, found {8 + len(GOOD)}",
        ),
        (file_bytes(b'{"\xff\xfe":1}'), "the header is not UTF-8"),
        (file_bytes("nonsense"), "not valid JSON"),
        (file_bytes(""), "not valid JSON"),
        (file_bytes("[]"), "JSON list, expected an object"),
        (file_bytes("null"), "JSON NoneType, expected an object"),
        (file_bytes('{"a":' + "[" * 200_000 + "]" * 200_000 + "}"), "nested too deep"),
        (file_bytes('{"__metadata__":{"a":' + "[" * 200_000 + "]" * 200_000 + "}}"), "nested too deep"),
        (file_bytes('{"a":NaN}'), "NaN is not an integer"),
        (file_bytes('{"a":1e999}'), "1e999 is not an integer"),
        (file_bytes('{"\\ud800":1}'), "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-LFS pointer"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "`git lfs pull`"),
        (b"PK\x03\x04" + bytes(99), "a zip archive, most likely a pickle"),
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}", "a pickle from torch.save"),
        (b"GGUF\x03\0\0\0" + bytes(99), "a GGUF file"),
        (b"<!DOCTYPE html><html>", "a web page"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_with_its_name(raw: bytes, reason: str) -> None:
    assert reason in refusal(raw)


def one(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]", more: str = "") -> str:
    return f'{{"w.x":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}}}'


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (one(dtype='"F33"'), "unknown dtype 'F33'"),
        (one(dtype="5"), "unknown dtype 5"),
        (one(dtype='["F32"]'), "unknown dtype ['F32']"),
        (one(shape="[2]"), "shape [2] of F32 takes 8 bytes, data_offsets give it 4"),
        (one(shape="2"), "shape must be a list of integers, found 2"),
        (one(shape="[true]"), "shape must be a list of integers"),
        (one(shape="[18446744073709551615,2]"), "overflows 64 bits"),
        (one(shape="[4611686018427387904,2]", offsets="[0,0]"), "overflows 64 bits"),
        (one(offsets="[4,0]"), "begin at 4, after their end 0"),
        (one(offsets="[0]"), "data_offsets must be two integers"),
        (one(offsets="[0,4,4]"), "data_offsets must be two integers"),
        (one(offsets="{}"), "data_offsets must be two integers"),
        (one(dtype='"F4"', shape="[3]"), "shape [3] of F4 ends inside a byte"),
        (one(more=',"strides":[1]'), "expected dtype, shape and data_offsets, found"),
        ('{"w.x":["F32",[1],[0,4]]}', "expected dtype, shape and data_offsets, found list"),
        ('{"w.x":{"dtype":"F32","shape":[1]}}', "expected dtype, shape and data_offsets, found"),
        (one(offsets="[1,5]"), "leaves a hole after the header: its data_offsets begin at 1, expected 0"),
    ],
)
def test_a_broken_entry_is_refused_with_file_and_tensor(header: str, reason: str) -> None:
    text = refusal(file_bytes(header, bytes(4)))
    assert reason in text
    assert "tensor w.x" in text


@pytest.mark.parametrize("number", ["-1", "-0", "1.0", "1e0", str(2**64), "9" * 5000])
def test_a_number_that_is_no_offset_is_refused(number: str) -> None:
    text = refusal(file_bytes(one(offsets=f"[{number},4]"), bytes(4)))
    assert "is not an integer" in text
    assert len(text) < 300


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ([0, 4], [0, 4], "tensor b overlaps a: its data_offsets begin at 0, expected 4"),
        ([0, 4], [2, 6], "tensor b overlaps a: its data_offsets begin at 2, expected 4"),
        ([0, 4], [5, 9], "tensor b leaves a hole after a: its data_offsets begin at 5, expected 4"),
        ([0, 4], [4, 8], None),
        ([4, 8], [0, 4], None),
    ],
)
def test_tensors_must_cover_the_data_without_hole_or_overlap(
    first: list[int], second: list[int], reason: str | None
) -> None:
    size = max(first[1], second[1])
    raw = file_bytes(header_json({"a": ("F32", [1], first), "b": ("F32", [1], second)}), bytes(size))
    if reason is None:
        assert read(raw).tensors["a"].nbytes == 4
    else:
        assert reason in refusal(raw)


def test_a_truncated_file_says_how_much_is_missing() -> None:
    whole = file_bytes(GOOD, bytes(16))
    for size in (len(whole) - 1, len(whole) - 8):
        expected = f"incomplete download? expected {len(whole)} bytes, found {size}"
        assert expected in refusal(whole[:size])


def test_trailing_bytes_are_refused() -> None:
    assert "3 bytes follow the last tensor" in refusal(file_bytes(GOOD, bytes(19)))


@pytest.mark.parametrize("second", ["[0,4]", "[4,8]"])
def test_a_name_given_twice_is_refused_even_if_identical(second: str) -> None:
    entry = '"dtype":"F32","shape":[1],"data_offsets":'
    header = f'{{"a":{{{entry}[0,4]}},"a":{{{entry}{second}}}}}'
    assert "'a' is given twice" in refusal(file_bytes(header, bytes(8 if second == "[4,8]" else 4)))


def test_metadata_must_be_strings() -> None:
    assert "__metadata__ of the header must map strings to strings" in refusal(
        file_bytes('{"__metadata__":{"a":1}}')
    )
    assert "__metadata__ of the header" in refusal(file_bytes('{"__metadata__":[]}'))
    assert "not valid JSON" in refusal(file_bytes('{"__metadata__":{"a":"b"}'))
    assert read(file_bytes('{"__metadata__":null}')).metadata == {}
    assert read(file_bytes("{}")).tensors == {}
    assert read(file_bytes('{"__metadata__":{}}   ')).tensors == {}


@pytest.mark.parametrize(
    "name", ["", "x" * 10_000, "größe.重み", "a/../b", "a\nb", 'a"b', "a\\b", " ", "\u2028\x7f"]
)
def test_any_name_that_json_can_write_is_a_name(name: str) -> None:
    raw = file_bytes(header_json({name: ("F32", [1], [0, 4])}), bytes(4))
    assert list(read(raw).tensors) == [name]
    broken = refusal(file_bytes(header_json({name: ("F32", [1], [0, 3])}), bytes(4)))
    assert len(broken) < 450
    assert "\n" not in broken


def test_a_tensor_called_metadata_is_no_tensor() -> None:
    raw = file_bytes(header_json({"__metadata__": ("F32", [1], [0, 4])}), bytes(4))
    assert "__metadata__ of the header must map strings to strings" in refusal(raw)


def test_empty_and_scalar_tensors_are_read() -> None:
    rows = {"none": ("F32", [0, 3], [0, 0]), "scalar": ("F64", [], [0, 8]), "end": ("U8", [0], [8, 8])}
    tensors = read(file_bytes(header_json(rows), bytes(8))).tensors
    assert {name: (entry.shape, entry.nbytes) for name, entry in tensors.items()} == {
        "none": ((0, 3), 0),
        "scalar": ((), 8),
        "end": ((0,), 0),
    }


def test_a_huge_header_is_read_in_bounded_time_and_memory() -> None:
    names = [f"model.layers.{i}.mlp.experts.{i}.down_proj.weight" for i in range(100_000)]
    rows = {name: ("U8", [1], [i, i + 1]) for i, name in enumerate(names)}
    raw = file_bytes(header_json(rows), bytes(len(names)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    assert len(read(raw).tensors) == len(names)
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


@pytest.mark.slow
def test_the_largest_header_is_read_in_bounded_time_and_memory() -> None:
    count = 860_000
    names = [f"model.layers.{i:06d}.mlp.experts.{i:06d}.down_proj.weight" for i in range(count)]
    header = header_json({name: ("U8", [1], [i, i + 1]) for i, name in enumerate(names)})
    assert 95_000_000 < len(header) < 100_000_000
    raw = file_bytes(header, bytes(count))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    assert len(read(raw).tensors) == count
    assert time.process_time() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_200_000  # KiB


def test_a_lying_length_allocates_nothing() -> None:
    asked: list[int] = []

    def read_some(begin: int, end: int) -> bytes:
        asked.append(end - begin)
        return file_bytes("{}", length=99_999_999)[begin:end]

    with pytest.raises(CheckpointError, match="does not fit"):
        read_header(read_some, 10, FILE)
    assert asked == [10]


def test_a_file_that_shrinks_meanwhile_is_noticed() -> None:
    with pytest.raises(CheckpointError, match="shrank while its header was read"):
        read_header(lambda begin, end: file_bytes(b" " * 300_000)[begin : min(end, 1000)], 400_000, FILE)


# The library as the oracle.

names = st.text(max_size=12) | st.sampled_from(["a", "b", "model.norm.weight", "__metadata__"])
dtypes = st.sampled_from([*DTYPE_BITS, "F32", "BF16", "F16", "U8"])
shapes = st.lists(st.integers(0, 5), max_size=3)


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, int]:
    """A header that is sound or nearly so, and the size of the data."""
    rows, end = [], 0
    for name in draw(st.lists(names, max_size=5, unique=draw(st.booleans()))):
        dtype, shape = draw(dtypes), draw(shapes)
        size = DTYPE_BITS[dtype]
        for length in shape:
            size *= length
        begin, end = end, end + size // 8
        rows.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}))
    if draw(st.booleans()):
        rows.insert(
            0, ("__metadata__", draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2)))
        )
    rows = draw(st.permutations(rows)) if draw(st.booleans()) else rows
    separators, ascii_only = draw(st.sampled_from([(",", ":"), (", ", ": ")])), draw(st.booleans())
    parts = [
        json.dumps(name, ensure_ascii=ascii_only)
        + separators[1]
        + json.dumps(row, ensure_ascii=ascii_only, separators=separators)
        for name, row in rows
    ]
    text = "{" + separators[0].join(parts) + "}" + " " * draw(st.integers(0, 3))
    raw = text.encode(errors="surrogatepass")
    if draw(st.booleans()):  # break something small
        place = draw(st.integers(0, len(raw) - 1))
        raw = (
            raw[:place]
            + draw(st.sampled_from([b"", b"0", b"1", b"-", b",", b'"', b"}", b" ", b"x"]))
            + raw[place + 1 :]
        )
    return raw, max(0, end + draw(st.sampled_from([0, 0, 0, 0, 1, -1])))


DELIBERATE = ("is given twice", "expected dtype, shape and data_offsets")


@settings(max_examples=400, deadline=None)
@given(headers())
def test_accepts_what_the_safetensors_library_accepts(case: tuple[bytes, int]) -> None:
    header, size = case
    raw = file_bytes(header, bytes(size))
    theirs = refused = ours = None
    with suppress(SafetensorError):
        theirs = {
            name: (info["dtype"], tuple(info["shape"]), len(info["data"])) for name, info in deserialize(raw)
        }
    try:
        ours = {name: (entry.dtype, entry.shape, entry.nbytes) for name, entry in read(raw).tensors.items()}
    except CheckpointError as error:
        refused = str(error)
    assert ours == theirs or any(reason in str(refused) for reason in DELIBERATE), refused


@settings(max_examples=200, deadline=None)
@given(headers())
def test_fast_and_full_parser_agree(case: tuple[bytes, int]) -> None:
    header, size = case
    try:
        fast = read(file_bytes(header, bytes(size)))
        full = parse_any(header.decode(), 8 + len(header), 8 + len(header) + size, FILE)
    except (CheckpointError, UnicodeDecodeError):
        return
    assert (fast.tensors, fast.metadata) == full


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(dtypes, st.integers(0, 9)), max_size=6))
def test_offsets_follow_each_other_to_the_end_of_the_file(rows: list[tuple[str, int]]) -> None:
    bounds = [0]
    for dtype, count in rows:
        bounds.append(bounds[-1] + DTYPE_BITS[dtype] * count)
    tensors = {
        f"t{i}": (dtype, [8, count], [begin, end])
        for i, ((dtype, count), (begin, end)) in enumerate(zip(rows, pairwise(bounds), strict=True))
    }
    header = read(file_bytes(header_json(tensors), bytes(bounds[-1])))
    assert [entry.nbytes for entry in header.tensors.values()] == [
        end - begin for begin, end in pairwise(bounds)
    ]


def test_fuzzing_finds_no_error_but_ours() -> None:
    fuzz_header.fuzz(random.Random(0), count=3000)
