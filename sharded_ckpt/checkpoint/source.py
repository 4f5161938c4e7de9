"""Where the files of a checkpoint are: a directory, a hub id, a URL, behind one small protocol."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from patchers.errors import CheckpointError, CheckpointNotFoundError
from sharded_ckpt.checkpoint.header import Header, read_header
from sharded_ckpt.checkpoint.local import LocalSource, similar, user_path
from sharded_ckpt.checkpoint.strict_json import parse_json

__all__ = [
    "INDEX_SUFFIX",
    "TensorSource",
    "check_name",
    "find_config",
    "holds_safetensors",
    "open_source",
    "parse_config",
    "parse_json",
    "read_config",
    "read_json",
    "read_source_header",
]

INDEX_SUFFIX = ".index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(?:@[\w.-]+)?", re.ASCII)
_OLD_HUB_ID = re.compile(r"[A-Za-z0-9_][\w-]*", re.ASCII)
_DRIVE = re.compile(r"[A-Za-z]:")


@runtime_checkable
class TensorSource(Protocol):
    """The files of one checkpoint. Names are relative to it and use `/`."""

    location: str
    """What the user gave, as it stands in errors."""

    @property
    def entry(self) -> str | None:
        """The one file that was asked for, an index or a safetensors file, or None for the checkpoint."""

    def names(self) -> list[str]:
        """Return the files at the top, sorted."""

    def exists(self, name: str) -> bool:
        """Return whether there is such a file; a remote source may have to ask."""

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the files that do not exist, asking once for all."""

    def size(self, name: str) -> int:
        """Return how many bytes a file has."""

    def read_bytes(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Return the bytes of a file from `begin` to `end` (exclusive)."""

    def ensure(self, names: Iterable[str]) -> None:
        """Make files ready to be opened, all at once; downloads what is not here."""

    def local_path(self, name: str) -> Path:
        """Return a path where other libraries find the file; downloads it if it is not here."""

    def is_here(self, name: str) -> bool:
        """Return whether the bytes of a file are on this machine."""

    def open(self, name: str) -> int | None:
        """Return a new file descriptor of a regular file, None if it is not on this machine (yet)."""

    def changed(self) -> bool:
        """Return whether the location shows other files now than those that were read."""


def open_source(
    location: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> TensorSource:
    """Find a checkpoint.

    Args:
        location: A directory; a `.safetensors` or `.index.json` file in one; a Hugging Face hub id such as
            `org/name` or `org/name@revision` (after `hf://` also with `/file`); or a URL that fsspec knows,
            such as `s3://bucket/folder`. What exists here is never looked up elsewhere.
        revision: Branch, tag or commit of a hub id.
        token: For hub ids that need one, as huggingface_hub takes it.
        cache_dir: Where downloads go instead of the usual cache.
        local_files_only: Use only what was downloaded before.

    Raises:
        CheckpointNotFoundError: There is nothing at that place.
        CheckpointError: It is a file of another kind.
    """
    text = os.fspath(location)
    hub = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    if text.startswith("hf://"):
        return _open_hub(text.removeprefix("hf://"), **hub)
    if "://" in text and not text.startswith("file:/"):
        from sharded_ckpt.checkpoint.remote import RemoteSource

        return RemoteSource(text, cache_dir=cache_dir)
    local = _open_local(text)
    if local is not None:
        return local
    if not isinstance(location, str) or _looks_like_path(text):
        raise CheckpointNotFoundError(f"{text}: no such file or directory{_hint(text)}")
    return _open_hub(text, **hub)


def _open_local(text: str) -> LocalSource | None:
    path = user_path(text)
    if path.is_dir():
        return LocalSource(path)
    index = path.with_name(path.name + INDEX_SUFFIX) if path.name.endswith(".safetensors") else path
    for candidate in (path, index):
        if candidate.name.endswith((".safetensors", INDEX_SUFFIX)) and candidate.exists():
            return LocalSource(candidate.parent, entry=candidate.name)
    if path.exists():
        raise CheckpointError(
            f"{text}: not a checkpoint; give its directory, its index ({INDEX_SUFFIX}) or a .safetensors file"
        )
    return None


def _looks_like_path(text: str) -> bool:
    if not _HUB_ID.fullmatch(text) or text.endswith((*_WEIGHT_SUFFIXES, ".json")) or ".." in text:
        return True
    # org/name where ./org is a directory is far more often a mistyped path than a hub id.
    return Path(text).parent.is_dir()


def _hint(text: str) -> str:
    """Return what may have been meant by a path that does not exist."""
    found = similar(user_path(text))
    if found or not _OLD_HUB_ID.fullmatch(text):
        return found
    return f". A hub id is org/name; one without an owner is asked for as hf://{text}"


def _open_hub(text: str, **options: Any) -> TensorSource:
    from sharded_ckpt.checkpoint.hub import HubSource

    owner, _, rest = text.partition("/")
    name, _, entry = rest.partition("/")
    return HubSource(f"{owner}/{name}" if name else owner, entry=entry or None, **options)


def check_name(name: Any, where: str) -> str:
    """Return the name of a file inside a checkpoint, which an index may give and nobody may trust.

    Args:
        name: What was found.
        where: Begin of the error: the file that gives the name.

    Raises:
        CheckpointError: It could lead out of the checkpoint, or is no name.

    Example:
        >>> check_name("weights/model-00001-of-00002.safetensors", "index")
        'weights/model-00001-of-00002.safetensors'
        >>> check_name("../other/model.safetensors", "index")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        patchers.errors.CheckpointError: index: unsafe file name '../other/model.safetensors': ...
    """
    if not isinstance(name, str):
        raise CheckpointError(f"{where}: a file name must be a string, found {name!r}")
    parts = name.split("/")
    if {"", ".", ".."} & set(parts) or "\\" in name or "\0" in name or _DRIVE.match(name):
        raise CheckpointError(
            f"{where}: unsafe file name {name!r}: expected a path inside the checkpoint, "
            "without '..', '.', backslashes, drive letters or a leading '/'"
        )
    return name


def read_json(source: TensorSource, name: str, *, limit: int = 64 * 2**20) -> Any:
    """Read a JSON file of a checkpoint, such as `config.json`.

    Args:
        source: The checkpoint.
        name: The file.
        limit: Bytes that the file may have at most.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: It is too large, or not JSON.
    """
    where = f"{source.location}/{name}"
    size = source.size(name)
    if size > limit:
        raise CheckpointError(
            f"{where}: {size} bytes are too many for this JSON file, expected at most {limit}"
        )
    return parse_json(source.read_bytes(name), where)


def read_config(source: TensorSource) -> dict[str, Any]:
    """Read the config.json of a checkpoint.

    Raises:
        CheckpointNotFoundError: There is none.
        CheckpointError: It is not JSON, or no object.
    """
    return _object(read_json(source, "config.json"), f"{source.location}/config.json")


def find_config(source: TensorSource) -> dict[str, Any] | None:
    """Read the config.json of a checkpoint; None if there is none."""
    return read_config(source) if source.exists("config.json") else None


def parse_config(raw: bytes, where: str) -> dict[str, Any]:
    """Read the content of a config.json of any name.

    Raises:
        CheckpointError: It is not JSON, or no object.
    """
    return _object(parse_json(raw, where), where)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: not a config: expected an object, found {value!r:.80}")
    return value


def holds_safetensors(source: TensorSource) -> bool:
    """Return whether there are safetensors files, or an index of some, at the top of a checkpoint."""
    return any(name.endswith((".safetensors", f".safetensors{INDEX_SUFFIX}")) for name in source.names())


def read_source_header(source: TensorSource, name: str) -> Header:
    """Read and check the header of one file of a checkpoint, and fetch no more of it."""

    def read(begin: int, end: int) -> bytes:
        return source.read_bytes(name, begin, end)

    return read_header(read, source.size(name), f"{source.location}/{name}")
