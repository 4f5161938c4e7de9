"""Safetensors files and indexes made byte by byte, sound or broken in exactly one way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def header_json(tensors: Mapping[str, tuple[str, list[int], list[int]]], **metadata: str) -> bytes:
    """The header of tensors given as (dtype, shape, data_offsets), as safetensors writes it."""
    rows = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, (dtype, shape, offsets) in tensors.items()
    }
    top = {"__metadata__": metadata, **rows} if metadata else rows
    return json.dumps(top, separators=(",", ":"), ensure_ascii=False).encode()


def file_bytes(header: bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header and data; `length` lies about the length of the header."""
    header = header.encode() if isinstance(header, str) else header
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def write_tensors(path: Path, tensors: Mapping[str, bytes], **metadata: str) -> Path:
    """A file of U8 vectors."""
    rows, end = {}, 0
    for name, data in tensors.items():
        rows[name] = ("U8", [len(data)], [end, end := end + len(data)])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_bytes(header_json(rows, **metadata), b"".join(tensors.values())))
    return path


def write_index(
    folder: Path, weight_map: Any, name: str = "model.safetensors.index.json", **top: Any
) -> Path:
    """An index, or what pretends to be one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps({**top, "weight_map": weight_map}))
    return path


def write_checkpoint(folder: Path, shards: Mapping[str, Mapping[str, bytes]]) -> Path:
    """A sharded checkpoint of U8 vectors: for each file its tensors."""
    for file, tensors in shards.items():
        write_tensors(folder / file, tensors)
    total = sum(len(data) for tensors in shards.values() for data in tensors.values())
    weight_map = {key: file for file, tensors in shards.items() for key in tensors}
    write_index(folder, weight_map, metadata={"total_size": total})
    return folder
