"""How tensors will lie in files, decided before a byte is written: pure data, no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, TensorEntry, nbytes_of

TensorSpec: TypeAlias = "tuple[str, tuple[int, ...]]"
"""The dtype of a tensor, as safetensors calls it, and its shape."""

# Data begins with a page, so that a mapping of it is aligned for every dtype and for direct I/O.
_ALIGNMENT: Final = 4096
_NUMBER: Final = re.compile(r"\s*[-+]?\d+(?:\.\d*)?")


@dataclass(frozen=True)
class FileLayout:
    """What a file will look like, before a byte of it is written."""

    header: bytes
    """Length, JSON and padding."""
    tensors: Mapping[str, TensorEntry]
    """In file order."""

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return max((entry.end for entry in self.tensors.values()), default=len(self.header))


def plan_file(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> FileLayout:
    """Lay out a safetensors file: large items first, so that all are aligned, else in the order given.

    Args:
        tensors: For each name the dtype, as safetensors calls it, and the shape.
        metadata: Goes into the header as it is.

    Raises:
        CheckpointError: A name or the metadata cannot stand in a header.

    Example:
        >>> layout = plan_file({"flag": ("BOOL", (3,)), "weight": ("BF16", (2, 2))})
        >>> {name: entry.begin for name, entry in layout.tensors.items()}, layout.file_size
        ({'weight': 4096, 'flag': 4104}, 4107)
    """
    rows, offset = {}, 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -DTYPE_BITS[item[1][0]]):
        nbytes = nbytes_of(dtype, shape)
        rows[name] = (dtype, shape, offset, offset + nbytes)
        offset += nbytes
    header = _encode_header(rows, metadata)
    base = len(header)
    return FileLayout(
        header,
        {name: TensorEntry(dtype, shape, base + a, base + b) for name, (dtype, shape, a, b) in rows.items()},
    )


def _encode_header(
    rows: Mapping[str, tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, str] | None
) -> bytes:
    if "__metadata__" in rows or not all(isinstance(name, str) for name in rows):
        raise CheckpointError("tensor names must be strings, and '__metadata__' is taken by the file format")
    if any(not isinstance(part, str) for pair in (metadata or {}).items() for part in pair):
        raise CheckpointError(f"the metadata of a file maps strings to strings, found {metadata!r}")
    top: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, (dtype, shape, begin, end) in rows.items():
        top[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    try:
        text = json.dumps(top, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"a tensor name or the metadata is not valid Unicode: {error}") from None
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{len(rows)} tensors need a header of {len(text)} bytes, the format allows {MAX_HEADER_BYTES}: "
            "write more files (max_shard_size)"
        )
    return len(text).to_bytes(8, "little") + text


def _amount(size: object) -> float:
    """Return the number at the begin of a size; 1 if there is none, or more than that is wrong."""
    number = _NUMBER.match(size) if isinstance(size, str) else None
    if isinstance(size, int | float):
        return size
    return float(number[0]) if number else 1.0


def plan_shards(sizes: Mapping[str, int], max_shard_size: int | str | None = None) -> list[list[str]]:
    """Deal tensors, in their order, to files of a limited size; one beyond the limit gets a file of its own.

    Args:
        sizes: Bytes of each tensor.
        max_shard_size: Bytes of tensors in one file, or a text such as `"5GB"` (5 * 10**9 bytes) or `"700"`;
            None for no limit.

    Returns:
        The names in each file; no file is empty.

    Example:
        >>> plan_shards({"a": 6, "b": 3, "c": 9}, max_shard_size=10)
        [['a', 'b'], ['c']]
    """
    if max_shard_size is None:
        return [list(sizes)] if sizes else []
    if isinstance(max_shard_size, str) and max_shard_size.strip().isdecimal():
        max_shard_size = int(max_shard_size)
    if not _amount(max_shard_size) > 0:  # NaN is not either
        raise ConfigError(f"max_shard_size must be more than 0 bytes, found {max_shard_size}")
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        split = split_state_dict_into_shards_factory(
            dict(sizes), get_storage_size=int, filename_pattern="{suffix}", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ConfigError(f"max_shard_size {max_shard_size!r} is no size: {error}") from None
    return [names for names in split.filename_to_tensors.values() if names]
