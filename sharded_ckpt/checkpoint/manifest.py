"""The manifest of a checkpoint: size and SHA-256 of its files, to find what a disk or a copy has damaged."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.source import check_name, parse_json
from sharded_ckpt.checkpoint.storage import PathLike

MANIFEST_FILE: Final = "manifest.json"

_FORMAT: Final = "sharded_ckpt.manifest.v1"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class FileDigest:
    """What a file must be."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What the files of a checkpoint must be, by their names relative to it.

    Example:
        >>> manifest = Manifest({"config.json": FileDigest(2, "0" * 64)})
        >>> parse_manifest(manifest.to_json(), "manifest.json") == manifest
        True
    """

    files: Mapping[str, FileDigest]

    def to_json(self) -> bytes:
        """Return the content of the manifest file."""
        files = {name: asdict(self.files[name]) for name in sorted(self.files)}
        return json.dumps({"format": _FORMAT, "files": files}, indent=2).encode() + b"\n"


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Check the JSON of a manifest and return what it says.

    Args:
        raw: The JSON.
        where: The file, as it is named in errors.

    Raises:
        CheckpointError: It is not a manifest of ours.
    """
    top = parse_json(raw, where)
    if not isinstance(top, dict) or top.get("format") != _FORMAT or not isinstance(top.get("files"), dict):
        raise CheckpointError(f"{where}: not a manifest: expected an object of format {_FORMAT} with `files`")
    return Manifest(
        {check_name(name, where): _digest(name, said, where) for name, said in top["files"].items()}
    )


def _digest(name: str, said: object, where: str) -> FileDigest:
    size, sha256 = (said.get("size"), said.get("sha256")) if isinstance(said, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise CheckpointError(f"{where}: {name}: expected size and sha256, found {said!r:.120}")
    return FileDigest(size, sha256)


def digest_file(path: PathLike) -> FileDigest:
    """Read a file and return what it is."""
    hasher, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            hasher.update(chunk)
            size += len(chunk)
    return FileDigest(size, hasher.hexdigest())
