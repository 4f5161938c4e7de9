"""Other people's `torch.distributed.checkpoint` directories, read without running what is in them.

torch reads `.metadata` with `pickle.load`, and what is no tensor with `weights_only=False`: a hostile
directory runs code. Here only the classes that describe a checkpoint can come out of `.metadata`, files
outside of the directory are refused, and values are read with `weights_only=True`. With
`SafeFileSystemReader` and `SafeLoadPlanner`, `torch.distributed.checkpoint.load` itself can be used, for
DTensors, too.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from patchers.errors import CheckpointError, CheckpointNotFoundError, MissingKeysError
from patchers.names import fold
from sharded_ckpt.checkpoint.layout import TensorSpec
from sharded_ckpt.checkpoint.source import check_name
from sharded_ckpt.checkpoint.writer import DTYPE_NAMES

METADATA_FILE: Final = ".metadata"

_ALLOWED: Final = frozenset(
    {
        *((dcp_metadata.__name__, name) for name in dcp_metadata.__all__),
        (dcp_metadata.__name__, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }
)
"""What a `.metadata` may name; all of it only holds data."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def read_dcp_metadata(directory: str | os.PathLike[str]) -> Metadata:
    """Return what a DCP directory says of itself, after checking it.

    Raises:
        CheckpointNotFoundError: There is no `.metadata`.
        CheckpointError: It is broken, asks for code, names files outside of the directory, or does not cover
            its tensors.
    """
    path = Path(directory) / METADATA_FILE
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFoundError(
            f"{directory}: no {METADATA_FILE}, so no checkpoint of torch DCP"
        ) from None
    try:
        metadata = _MetadataUnpickler(io.BytesIO(raw)).load()
    except Exception as error:  # a broken pickle can raise anything
        raise CheckpointError(f"{path}: not read, {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise CheckpointError(
            f"{path}: expected the metadata of a checkpoint, found {type(metadata).__name__}"
        )
    for info in (metadata.storage_data or {}).values():
        check_name(getattr(info, "relative_path", None), str(path))
    for key, said in metadata.state_dict_metadata.items():
        if isinstance(said, TensorStorageMetadata):
            _check_cover(key, said, path)
    return metadata


class SafeFileSystemReader(dcp.FileSystemReader):
    """torch's reader of a DCP directory, but for how it reads `.metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata, checked."""
        metadata = read_dcp_metadata(os.fspath(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafeLoadPlanner(DefaultLoadPlanner):
    """torch's load planner, but for how it reads what is no tensor: `weights_only=True`."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Put a value in its place, if reading it runs no code.

        Raises:
            CheckpointError: Reading it would.
        """
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{read_item.dest_index.fqn}: holds more than plain data, which is not loaded because it "
                f"could run code: {error}"
            ) from error
        buffer = io.BytesIO()
        torch.save(loaded, buffer)  # plain data by now, which torch puts in its place
        buffer.seek(0)
        super().load_bytes(read_item, buffer)


class DcpWeights:
    """The tensors of a DCP directory as a source of weights.

    Args:
        directory: The directory.
        prefix: Only keys that begin so, and without it: `"model."` for what was saved as `{"model": …}`.
    """

    def __init__(self, directory: str | os.PathLike[str], prefix: str = "") -> None:
        self._directory, self._prefix, self.where = directory, prefix, os.fspath(directory)
        metadata = read_dcp_metadata(directory)
        self._tensors = {
            key.removeprefix(prefix): said
            for key, said in metadata.state_dict_metadata.items()
            if isinstance(said, TensorStorageMetadata) and key.startswith(prefix)
        }

    def specs(self) -> dict[str, TensorSpec]:
        """Return dtype and shape of every tensor."""
        return {
            k: (DTYPE_NAMES[str(said.properties.dtype)], tuple(said.size))
            for k, said in self._tensors.items()
        }

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors, whole, however they were spread when they were saved.

        Raises:
            MissingKeysError: There are no such tensors.
            CheckpointError: A file is broken.
        """
        wanted = list(keys)
        if missing := [key for key in wanted if key not in self._tensors]:
            raise MissingKeysError(f"{self.where}: not in the checkpoint: {fold(missing)}")
        state: dict[str, Any] = {self._prefix + key: self._empty(key) for key in wanted}
        reader, planner = SafeFileSystemReader(self._directory), SafeLoadPlanner()
        try:
            with warnings.catch_warnings():  # it warns that one process reads alone, which is what is meant
                warnings.simplefilter("ignore", UserWarning)
                dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)
        except dcp.CheckpointException as error:  # a BaseException, which nobody would catch
            raise CheckpointError(f"{self.where}: cannot be read: {error}") from error
        return {key.removeprefix(self._prefix): tensor for key, tensor in state.items()}

    def iter_tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Give tensors one by one."""
        return iter(self.read(keys).items())

    def _empty(self, key: str) -> Tensor:
        said = self._tensors[key]
        return torch.empty(said.size, dtype=said.properties.dtype)


def _check_cover(key: str, said: TensorStorageMetadata, path: Path) -> None:
    """Raise unless the chunks of a tensor lie in it and are as many elements: else some would stay unset."""
    for chunk in said.chunks:
        sizes = zip(chunk.offsets, chunk.sizes, said.size, strict=True)
        if any(begin < 0 or size < 0 or begin + size > end for begin, size, end in sizes):
            raise CheckpointError(f"{path}: a chunk of {key} lies outside of its shape {tuple(said.size)}")
    covered = sum(math.prod(chunk.sizes) for chunk in said.chunks)
    if covered != math.prod(said.size):
        raise CheckpointError(
            f"{path}: the chunks of {key} have {covered} elements, its shape {tuple(said.size)} has "
            f"{math.prod(said.size)}"
        )
