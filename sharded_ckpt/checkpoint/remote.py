"""A checkpoint behind a URL that fsspec knows: only the byte ranges needed are fetched."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from patchers.errors import CheckpointError, CheckpointNotFoundError, ConfigError

_TELLING = (
    *("size", "ETag", "etag", "md5Hash", "content_md5", "generation", "VersionId", "version_id"),
    *("LastModified", "last_modified", "updated", "mtime", "modified", "modificationTime", "created"),
)
"""What file systems say of a file that changes with its content, and with nothing else."""


class RemoteSource:
    """The files under one URL, such as `s3://bucket/folder` or `memory://folder`.

    Args:
        url: A folder, or an index or safetensors file in one.
        cache_dir: Where `local_path` puts copies, which later sources find there as long as the file at the
            URL stays the same; if not given, a temporary directory that goes with this.

    Raises:
        ConfigError: What speaks this protocol is not installed.
        CheckpointNotFoundError: There is nothing at that place.
    """

    def __init__(self, url: str, *, cache_dir: str | os.PathLike[str] | None = None) -> None:
        try:
            import fsspec

            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{url}: cannot be opened: {error}; try `pip install sharded-ckpt[remote]` "
                "and the package that fsspec names for this protocol"
            ) from error
        self.location = url.rstrip("/")
        self._entry: str | None = None
        self._seen: dict[str, str] = {}
        self._root = root.rstrip("/")
        self._copies = None if cache_dir is None else Path(cache_dir)
        if url.endswith((".safetensors", ".json")):
            self._root, _, self._entry = self._root.rpartition("/")
            self.location = self.location.rpartition("/")[0]
        with self._errors(url):
            if not self._fs.exists(self._path(self._entry) if self._entry else self._root):
                raise CheckpointNotFoundError(f"{url}: no such file or folder")

    @property
    def entry(self) -> str | None:
        """The one file that was asked for, or None for the whole folder."""
        return self._entry

    def names(self) -> list[str]:
        """Return the files at the top, sorted."""
        with self._errors(self.location):
            entries = self._fs.ls(self._root, detail=True)
        return sorted(entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file")

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        with self._errors(f"{self.location}/{name}"):
            return bool(self._fs.isfile(self._path(name)))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the files that do not exist."""
        return [name for name in names if not self.exists(name)]

    def size(self, name: str) -> int:
        """Return how many bytes a file has."""
        with self._errors(f"{self.location}/{name}"):
            return int(self._fs.size(self._path(name)))

    def read_bytes(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Return the bytes of a file from `begin` to `end` (exclusive)."""
        with self._errors(f"{self.location}/{name}"):
            if name not in self._seen:
                self._seen[name] = self._identity(name)
            return bytes(self._fs.cat_file(self._path(name), start=begin, end=end))

    def ensure(self, names: Iterable[str]) -> None:
        """Do nothing: the bytes needed are fetched when they are read."""

    def local_path(self, name: str) -> Path:
        """Return the path of a local copy of a file; makes it if there is none yet."""
        if self._copies is None:
            self._copies = Path(tempfile.mkdtemp(prefix="sharded-ckpt-"))
            weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)
        with self._errors(f"{self.location}/{name}"):
            path = self._copies / self._version(name) / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._fetch(name, path)
        return path

    def is_here(self, name: str) -> bool:
        """Return False: no file is."""
        return False

    def open(self, name: str) -> int | None:
        """Return None: the bytes must be fetched."""
        return None

    def changed(self) -> bool:
        """Return whether a file that was read is another one now, as far as its file system tells."""
        try:
            return any(self._identity(name) != seen for name, seen in self._seen.items())
        except FileNotFoundError:
            return True
        except Exception:  # each file system has errors of its own; opening it again would meet them, too
            return False

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _version(self, name: str) -> str:
        """Return a folder for the copy of a file as it is now: every checkpoint has a `config.json`."""
        told = f"{self.location}/{name} {self._identity(name)}"
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def _identity(self, name: str) -> str:
        """Return what the file system says that tells a file from another one of its name."""
        info = self._fs.info(self._path(name))
        return repr([(field, info[field]) for field in _TELLING if field in info])

    def _fetch(self, name: str, path: Path) -> None:
        """Copy a file to a path, where it appears whole: others may look there, and we may die."""
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            self._fs.get_file(self._path(name), str(part))
            part.replace(path)

    @contextmanager
    def _errors(self, where: str) -> Iterator[None]:
        """Turn whatever a file system raises into an error that names the file."""
        try:
            yield
        except CheckpointError:
            raise
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"{where}: no such file or folder") from None
        except Exception as error:  # each file system has errors of its own
            raise CheckpointError(f"{where}: cannot be read: {type(error).__name__}: {error}") from error
