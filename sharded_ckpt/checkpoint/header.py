"""The header of one safetensors file: which tensors it holds, and where.

The format (https://github.com/huggingface/safetensors#format): eight bytes, the length `n` of the header
as an unsigned little-endian integer; `n` bytes of JSON, an object of
`name: {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}` with offsets counted from the end of the
header, and an optional `"__metadata__"` of strings; then the data, covered by the tensors without a hole.

What is accepted here is what the `safetensors` library accepts, less four things that no known writer
produces and that can hide a contradiction: a tensor name given twice (they accept an identical repetition),
a metadata name given twice, fields of an entry other than the three above, and an entry given as a list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, repeat

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.entry import DTYPE_BITS, TensorEntry, nbytes_of, shorten
from sharded_ckpt.checkpoint.header_json import DECODER, Parsed, parse_any

__all__ = [
    "DTYPE_BITS",
    "FIRST_READ_BYTES",
    "MAX_HEADER_BYTES",
    "Header",
    "TensorEntry",
    "header_length",
    "nbytes_of",
    "parse_header",
    "read_header",
    "shorten",
]

MAX_HEADER_BYTES = 100_000_000
"""The longest header that safetensors reads and writes."""

FIRST_READ_BYTES = 256 * 1024
"""Enough for the whole header of most files, so that one read gets it."""

_ENTRY = re.compile(r',"([^"]*)":\{"dtype":"([^]]*)\],"data_offsets":\[([^,]*),([^]]*)\]\}')
_ENTRY_FRAME = len(',"":{"dtype":"],"data_offsets":[,]}')
_LAYOUT = re.compile(r'([A-Z0-9_]+)","shape":\[((?:0|[1-9][0-9]{0,18})(?:,(?:0|[1-9][0-9]{0,18}))*)?')
_NEEDS_ESCAPE = ("\\", *map(chr, range(32)))
_METADATA_START = '{"__metadata__":{'
_FOREIGN = (
    (
        b"version https://git-lfs",
        "it is a git-LFS pointer, the file itself was not fetched: run `git lfs pull` in its folder",
    ),
    (b"PK\x03\x04", "it is a zip archive, most likely a pickle from torch.save: convert it to safetensors"),
    (b"\x80", "it looks like a pickle from torch.save: convert it to safetensors"),
    (b"GGUF", "it is a GGUF file"),
    (b"<", "it looks like a web page, perhaps the error page of a failed download: fetch the file again"),
)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself, checked."""

    file: str
    """The file, as it is named in errors."""
    tensors: Mapping[str, TensorEntry]
    """In file order; an empty one stands before the one that begins where it is."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    data_begin: int = 8
    """Offset of the first byte of data, from the begin of the file."""
    file_size: int = 8
    """Bytes of the whole file."""


def read_header(read: Callable[[int, int], bytes], file_size: int, file: str) -> Header:
    """Read and check the header of a file.

    Args:
        read: Gives the bytes from an offset to another one (exclusive).
        file_size: Bytes of the whole file.
        file: The name of the file in errors.

    Raises:
        CheckpointError: The file is not a sound safetensors file; the message says which and why.
    """
    start = read(0, min(file_size, FIRST_READ_BYTES))
    data_begin = 8 + header_length(start[:64], file_size, file)
    if data_begin > len(start):
        start += read(len(start), data_begin)
    if len(start) < data_begin:
        raise CheckpointError(f"{file}: the file shrank while its header was read")
    return parse_header(start[8:data_begin], file_size=file_size, file=file)


def header_length(start: bytes, file_size: int, file: str) -> int:
    """Return the length of the header in bytes: it fits in the file and is no more than safetensors allows.

    Args:
        start: The first bytes of the file; eight are needed, more help to say what else the file is.
        file_size: Bytes of the whole file.
        file: The name of the file in errors.
    """
    if file_size == 0:
        raise CheckpointError(f"{file}: the file is empty; an incomplete download or save?")
    if file_size < 8 or len(start) < 8:
        raise CheckpointError(
            f"{file}: {file_size} bytes are too short for a safetensors file; an incomplete download or save?"
        )
    length = int.from_bytes(start[:8], "little")
    if length <= MAX_HEADER_BYTES and 8 + length <= file_size:
        return length
    for magic, reason in _FOREIGN:
        if start.startswith(magic):
            raise CheckpointError(f"{file}: not a safetensors file: {reason}")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: not a safetensors file: it announces a header of {length} bytes, "
            f"the format allows {MAX_HEADER_BYTES}"
        )
    raise CheckpointError(
        f"{file}: the header does not fit in the file; an incomplete download? "
        f"expected at least {8 + length} bytes, found {file_size}"
    )


def parse_header(raw: bytes, *, file_size: int, file: str) -> Header:
    """Check the JSON of a header and return what it says.

    Args:
        raw: The JSON, without the eight bytes of its length.
        file_size: Bytes of the whole file; the data must end there exactly.
        file: The name of the file in errors.

    Raises:
        CheckpointError: Anything is wrong; the message names the file, and the tensor where there is one.

    Example:
        >>> raw = b'{"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
        >>> parse_header(raw, file_size=8 + len(raw) + 12, file="a.safetensors").tensors
        {'a': TensorEntry(dtype='BF16', shape=(2, 3), begin=66, end=78)}
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: the header is not UTF-8: {error}") from None
    data_begin = 8 + len(raw)
    parsed = _parse_canonical(text, data_begin, file_size) or parse_any(text, data_begin, file_size, file)
    return Header(file, *parsed, data_begin, file_size)


def _parse_canonical(text: str, data_begin: int, file_size: int) -> Parsed | None:
    """Read a header as safetensors writes it, in C loops only; None where anything is unusual or wrong."""
    try:
        body, metadata = _split_metadata(text.rstrip(" "))
        found = _ENTRY.findall(body)
        if any(character in body for character in _NEEDS_ESCAPE):
            return None
        names, layouts, begins, ends = zip(*found, strict=True) if found else ((),) * 4
        # Matches do not overlap: if their lengths add up, they are the body, nothing lies between them.
        matched = sum(len("".join(part)) for part in (names, layouts, begins, ends))
        if matched + _ENTRY_FRAME * len(found) != len(body):
            return None
        known = {layout: _read_layout(layout) for layout in set(layouts)}
    except (KeyError, ValueError, RecursionError):
        return None
    dtypes, shapes, sizes = zip(*map(known.__getitem__, layouts), strict=True) if found else ((),) * 3
    # The tensors follow each other, so that their sizes alone say what every offset must be.
    bounds = list(accumulate(sizes, initial=0))
    texts = tuple(map(str, bounds))
    if data_begin + bounds[-1] != file_size or begins != texts[:-1] or ends != texts[1:]:
        return None
    bounds = [data_begin + bound for bound in bounds]
    # tuple.__new__ skips the Python frame of TensorEntry.__new__, a third of the cost of a key.
    rows = map(tuple.__new__, repeat(TensorEntry), zip(dtypes, shapes, bounds, bounds[1:], strict=False))
    tensors = dict(zip(names, rows, strict=False))
    if len(tensors) != len(names) or "__metadata__" in tensors:
        return None
    return tensors, metadata


def _split_metadata(text: str) -> tuple[str, dict[str, str]]:
    """Return the entries, each led by a comma, and the metadata; ValueError if there is anything unusual."""
    if not (text.startswith("{") and text.endswith("}")):
        raise ValueError
    if not text.startswith(_METADATA_START):
        return ("," + text[1:-1] if len(text) > 2 else ""), {}
    metadata, end = DECODER.raw_decode(text, len(_METADATA_START) - 1)
    if end == len(text) or not all(type(value) is str for value in metadata.values()):
        raise ValueError
    return text[end:-1], metadata


def _read_layout(text: str) -> tuple[str, tuple[int, ...], int]:
    """Return dtype, shape and size in bytes; ValueError or KeyError if they cannot be."""
    match = _LAYOUT.fullmatch(text)
    if not match:
        raise ValueError
    dtype, shape = match[1], tuple(map(int, match[2].split(","))) if match[2] else ()
    return dtype, shape, nbytes_of(dtype, shape)
