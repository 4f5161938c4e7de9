"""Checkpoints in pickle format (`pytorch_model.bin`), for those who ask for them by name.

Nothing else in this package opens a pickle. `torch.load(weights_only=True)` runs no code of the file, with
the torch that this package requires (CVE-2025-32434 was mended in 2.6, GHSA-63cw-57p8-fm3p in 2.10).
"""

from __future__ import annotations

from collections.abc import Iterable
from pickle import UnpicklingError
from zipfile import BadZipFile, is_zipfile

import torch

from patchers.errors import CheckpointError, CheckpointNotFoundError, MissingKeysError
from patchers.names import fold
from sharded_ckpt.checkpoint.entry import shorten
from sharded_ckpt.checkpoint.source import INDEX_SUFFIX, TensorSource, check_name, read_json

SINGLE_PICKLE = "pytorch_model.bin"
INDEX_PICKLE = SINGLE_PICKLE + INDEX_SUFFIX
_SUFFIXES = (".bin", ".pt", ".pth")


def read_pickle_shards(source: TensorSource, keys: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Read tensors of a checkpoint in pickle format, mapped where the file allows it.

    Args:
        source: The checkpoint.
        keys: Tensor names, all if not given. With an index, only the files that hold them are opened.

    Raises:
        CheckpointNotFoundError: There is no such checkpoint, or a file of it is missing.
        MissingKeysError: It has no such tensors.
        CheckpointError: A file is broken, or holds anything but tensors by name.
    """
    wanted = None if keys is None else dict.fromkeys(keys)
    files = _files(source, wanted)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        for key, tensor in _load(source, file).items():
            if key in tensors:
                raise CheckpointError(
                    f"{source.location}: two files hold tensor {shorten(key)}, one is {file}"
                )
            tensors[key] = tensor
    if wanted is None:
        return tensors
    if missing := [key for key in wanted if key not in tensors]:
        raise MissingKeysError(f"{source.location}: not in the checkpoint: {fold(missing)}")
    return {key: tensors[key] for key in wanted}


def _files(source: TensorSource, wanted: Iterable[str] | None) -> list[str]:
    """Return the files that hold the tensors, or may hold them."""
    if source.exists(INDEX_PICKLE):
        where = f"{source.location}/{INDEX_PICKLE}"
        index = read_json(source, INDEX_PICKLE)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{where}: not an index: expected an object with an object `weight_map`")
        keys = weight_map if wanted is None else [key for key in wanted if key in weight_map]
        files = sorted({check_name(weight_map[key], where) for key in keys})
    elif source.exists(SINGLE_PICKLE):
        files = [SINGLE_PICKLE]
    else:
        files = [name for name in source.names() if name.endswith(_SUFFIXES)]
        if len(files) != 1:
            found = ", ".join(files) or "no such file"
            raise CheckpointNotFoundError(
                f"{source.location}: expected {INDEX_PICKLE} or {SINGLE_PICKLE}, found {found}"
            )
    if missing := source.missing(files):
        raise CheckpointNotFoundError(f"{source.location}: missing files: {', '.join(missing)}")
    source.ensure(files)
    return files


def _load(source: TensorSource, file: str) -> dict[str, torch.Tensor]:
    path = source.local_path(file)
    where = f"{source.location}/{file}"
    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except UnpicklingError as error:
        raise CheckpointError(
            f"{where}: holds more than tensors, which is not loaded because it could run code: {error}"
        ) from error
    except (RuntimeError, EOFError, BadZipFile, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{where}: broken, or not made by torch.save: {error}") from error
    if isinstance(loaded, dict) and set(loaded) == {"state_dict"}:
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{where}: expected tensors by name, found {type(loaded).__name__}")
    for key, value in loaded.items():
        if not (isinstance(key, str) and isinstance(value, torch.Tensor)):
            raise CheckpointError(
                f"{where}: expected tensors by name, found {key!r:.80}: {type(value).__name__}"
            )
    return loaded
