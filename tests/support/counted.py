"""A file system that writes down which bytes of which file are read: local files under `counted://`."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class CountedFileSystem(LocalFileSystem):
    """Local files; `reads` are the ranges that were read of each, by its path."""

    protocol = "counted"
    reads: dict[str, list[tuple[int, int]]] = {}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        content: bytes = super().cat_file(path, start=start, end=end, **options)
        begin = start or 0
        self.reads.setdefault(self._strip_protocol(path), []).append((begin, begin + len(content)))
        return content


fsspec.register_implementation("counted", CountedFileSystem, clobber=True)


def counted_url(folder: Path) -> str:
    """The URL of a folder whose reads are counted from now on, and no others."""
    CountedFileSystem.reads.clear()
    return f"counted://{folder}"


def keys_read(folder: Path) -> set[str]:
    """The tensors of which any byte was read since `counted_url`, but for what came along with a header."""
    found = set()
    for path, ranges in CountedFileSystem.reads.items():
        if not path.endswith(".safetensors"):
            continue
        assert Path(path).parent == folder
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            if any(here and begin < there and here < end for here, there in ranges):
                found.add(key)
    return found
