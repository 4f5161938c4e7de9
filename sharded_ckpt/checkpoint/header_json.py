"""The JSON of a safetensors header, checked one thing at a time: slow, and says exactly what is wrong."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any, TypeAlias

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.entry import DTYPE_BITS, UINT64_MAX, TensorEntry, nbytes_of, shorten
from sharded_ckpt.checkpoint.strict_json import unique_names

Parsed: TypeAlias = "tuple[dict[str, TensorEntry], dict[str, str]]"
"""The tensors and the metadata of a header."""

_FIELDS = {"dtype", "shape", "data_offsets"}


def _natural(text: str) -> int:
    if text.startswith("-") or len(text) > 20 or int(text) > UINT64_MAX:
        raise ValueError(f"{text[:40]} is not an integer from 0 to 2**64 - 1")
    return int(text)


def _refuse_number(text: str) -> Any:
    raise ValueError(f"{text[:40]} is not an integer")


DECODER = json.JSONDecoder(
    object_pairs_hook=unique_names,
    parse_int=_natural,
    parse_float=_refuse_number,
    parse_constant=_refuse_number,
)


def parse_any(text: str, data_begin: int, file_size: int, file: str) -> Parsed:
    """Read any header and check one thing at a time, so that the error says which one is wrong."""
    top = _load_json(text, file)
    if not isinstance(top, dict):
        raise CheckpointError(f"{file}: the header is a JSON {type(top).__name__}, expected an object")
    metadata = _check_metadata(top.pop("__metadata__", None), file)
    tensors = {name: _check_entry(name, entry, data_begin, file) for name, entry in top.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1][2:]))
    _check_cover(tensors, data_begin, file_size, file)
    return tensors, metadata


def _load_json(text: str, file: str) -> Any:
    try:
        top = DECODER.decode(text)
        _check_unicode(top)
    except RecursionError:
        raise CheckpointError(f"{file}: the header is no safetensors header: JSON nested too deep") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: the header is not valid JSON: {error}") from None
    return top


def _check_unicode(top: Any) -> None:
    """Raise ValueError for escapes that stand for half a character: no such name could be written again."""
    if isinstance(top, dict):
        metadata = top.get("__metadata__")
        texts = [*top, *(chain.from_iterable(metadata.items()) if isinstance(metadata, dict) else ())]
        "".join(text for text in texts if isinstance(text, str)).encode()


def _check_metadata(metadata: Any, file: str) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ of the header must map strings to strings")
    return metadata


def _check_entry(name: str, entry: Any, data_begin: int, file: str) -> TensorEntry:
    where = f"{file}: tensor {shorten(name)}"
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {found!s:.120}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r:.80}; known are {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise CheckpointError(f"{where}: shape must be a list of integers, found {shape!r:.80}")
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise CheckpointError(f"{where}: data_offsets must be two integers, found {offsets!r:.80}")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where}: data_offsets begin at {begin}, after their end {end}")
    try:
        nbytes = nbytes_of(dtype, tuple(shape))
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if end - begin != nbytes:
        raise CheckpointError(
            f"{where}: shape {shape!s:.80} of {dtype} takes {nbytes} bytes, "
            f"data_offsets give it {end - begin}"
        )
    return TensorEntry(dtype, tuple(shape), data_begin + begin, data_begin + end)


def _check_cover(tensors: dict[str, TensorEntry], data_begin: int, file_size: int, file: str) -> None:
    """Check that the tensors, in file order, follow each other from the header to the end of the file."""
    reached, before = data_begin, "the header"
    for name, entry in tensors.items():
        if entry.begin != reached:
            fault = "overlaps" if entry.begin < reached else "leaves a hole after"
            raise CheckpointError(
                f"{file}: tensor {shorten(name)} {fault} {before}: its data_offsets begin at "
                f"{entry.begin - data_begin}, expected {reached - data_begin}"
            )
        reached, before = entry.end, shorten(name)
    if reached > file_size:
        raise CheckpointError(
            f"{file}: the file is cut off; an incomplete download? "
            f"expected {reached} bytes, found {file_size}"
        )
    if reached < file_size:
        raise CheckpointError(
            f"{file}: {file_size - reached} bytes follow the last tensor; expected {reached} bytes, "
            f"found {file_size}"
        )
