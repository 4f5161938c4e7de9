"""A checkpoint on the Hugging Face hub: one commit of it, of which only the files needed are downloaded."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from patchers.errors import CheckpointError, CheckpointNotFoundError
from sharded_ckpt.checkpoint.local import LocalSource, similar

logger = logging.getLogger(__name__)


class Download(NamedTuple):
    """One file that a load needs."""

    name: str
    nbytes: int
    is_cached: bool


class HubSource:
    """The files of one commit of a model repository; everything is read from the same commit.

    One request lists names and sizes. Without a connection, or with `local_files_only`, what is in the
    cache is used.

    Args:
        repo: `org/name`, also `org/name@revision`.
        entry: The one file that is asked for.
        revision: Branch, tag or commit.
        token: For repositories that need one.
        cache_dir: Where downloads go, the cache of huggingface_hub if not given.
        local_files_only: Use only what was downloaded before.

    Raises:
        CheckpointNotFoundError: There is no such repository or revision, here or there.
    """

    def __init__(
        self,
        repo: str,
        *,
        entry: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        self.location = repo
        self._repo, _, suffix = repo.partition("@")
        self._revision = revision or suffix or "main"
        self._token = token
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._entry = entry
        self._sizes: dict[str, int] | None = None
        try:
            self._sizes = None if local_files_only else self._list()
        except Exception as error:  # of whichever HTTP client huggingface_hub uses
            self._folder = self._find_cached(error)
        else:
            self._folder = self._find_cached(None)

    @property
    def entry(self) -> str | None:
        """The one file that was asked for, or None for the whole checkpoint."""
        return self._entry

    def names(self) -> list[str]:
        """Return the files at the top, sorted."""
        if self._sizes is None:
            return self._here().names()
        return sorted(name for name in self._sizes if "/" not in name)

    def exists(self, name: str) -> bool:
        """Return whether the commit has such a file."""
        return self._here().exists(name) if self._sizes is None else name in self._sizes

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the files that do not exist."""
        return [name for name in names if not self.exists(name)]

    def size(self, name: str) -> int:
        """Return how many bytes a file has."""
        if self._sizes is None:
            return self._here().size(name)
        if name not in self._sizes:
            raise CheckpointNotFoundError(f"{self.location}/{name}: no such file on the hub")
        return self._sizes[name]

    def read_bytes(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Return the bytes of a file from `begin` to `end` (exclusive); fetches no more of a large file."""
        if self.is_here(name) or end is None or self._sizes is None:
            self.ensure([name])
            return self._here().read_bytes(name, begin, end)
        return self._fetch(name, begin, min(end, self.size(name)))

    def downloads(self, names: Iterable[str]) -> list[Download]:
        """Say what `ensure` would download, and download nothing."""
        return [Download(name, self.size(name), self.is_here(name)) for name in names]

    def ensure(self, names: Iterable[str]) -> None:
        """Download the files that are not in the cache.

        Raises:
            CheckpointNotFoundError: The commit has no such file, or there is no connection.
            CheckpointError: The download failed.
        """
        wanted = [download for download in self.downloads(names) if not download.is_cached]
        if not wanted or self._sizes is None:
            return
        logger.info(
            "%s: downloading %d files, %.2f GB",
            self.location,
            len(wanted),
            sum(download.nbytes for download in wanted) / 1e9,
        )
        # By its name, so that the cache knows later, without a connection, which commit that was; unless the
        # branch has moved on since the files were listed.
        folder = self._download(self._revision, wanted)
        if folder.name != self._commit:
            folder = self._download(self._commit, wanted)
        self._folder = LocalSource(folder)

    def local_path(self, name: str) -> Path:
        """Return the path of a file in the cache; downloads it if it is not there."""
        self.ensure([name])
        return self._here().local_path(name)

    def open(self, name: str) -> int | None:
        """Return a new file descriptor of a file in the cache, None if it is not there."""
        return self._here().open(name) if self.is_here(name) else None

    def changed(self) -> bool:
        """Return False: a commit never changes."""
        return False

    def _list(self) -> dict[str, int]:
        from huggingface_hub import HfApi

        info = HfApi(token=self._token).model_info(
            self._repo, revision=self._revision, files_metadata=True, token=self._token
        )
        self._commit = info.sha or self._revision
        return {file.rfilename: file.size or 0 for file in info.siblings or ()}

    def _download(self, revision: str, wanted: Iterable[Download]) -> Path:
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                self._repo,
                revision=revision,
                token=self._token,
                cache_dir=self._cache_dir,
                allow_patterns=[glob.escape(download.name) for download in wanted],
            )
        except Exception as error:  # of whichever HTTP client huggingface_hub uses
            raise self._refusal(error) from error
        return Path(folder)

    def _find_cached(self, error: Exception | None) -> LocalSource | None:
        """Return the folder of the cache that holds this commit, or the last known one of the revision."""
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                self._repo,
                revision=self._commit if error is None and self._sizes is not None else self._revision,
                cache_dir=self._cache_dir,
                local_files_only=True,
                allow_patterns=[],  # the folder itself, however few of the files are in it
            )
        except Exception as nothing:  # neither is it in the cache
            if self._sizes is not None:
                return None
            raise self._refusal(error or nothing) from error
        return LocalSource(folder)

    def _here(self) -> LocalSource:
        if self._folder is None:
            raise CheckpointNotFoundError(f"{self.location}: nothing of it is in the cache")
        return self._folder

    def is_here(self, name: str) -> bool:
        """Return whether a file is in the cache."""
        return self._folder is not None and self._folder.exists(name)

    def _fetch(self, name: str, begin: int, end: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self._repo, name, revision=self._commit)
        headers = {**build_hf_headers(token=self._token), "Range": f"bytes={begin}-{end - 1}"}
        try:
            response = get_session().get(url, headers=headers)
            hf_raise_for_status(response)
        except Exception as error:  # of whichever HTTP client huggingface_hub uses
            raise self._refusal(error) from error
        content: bytes = response.content
        return content if response.status_code == 206 else content[begin:end]

    def _refusal(self, error: Exception) -> CheckpointError:
        """Say why the hub gives nothing, and what to try."""
        from huggingface_hub import errors

        reason = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
        if isinstance(error, errors.GatedRepoError):
            return CheckpointError(
                f"{self.location}: the repository is gated: accept its terms on its page, "
                "then log in with `hf auth login` or pass token="
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return CheckpointNotFoundError(
                f"{self.location}: the repository has no revision {self._revision!r}"
            )
        if self._sizes is not None:
            return CheckpointError(f"{self.location}: the download failed, try again ({reason})")
        where = f"{self.location}: neither a directory here nor a repository on the hub"
        hint = similar(Path(self.location))
        if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
            return CheckpointNotFoundError(
                f"{where}; check the name, and log in with `hf auth login` if it is private{hint}"
            )
        if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
            return CheckpointNotFoundError(
                f"{where} that was downloaded before, and downloads are off "
                f"(local_files_only=True or HF_HUB_OFFLINE){hint}"
            )
        return CheckpointNotFoundError(
            f"{where} that can be reached or was downloaded before ({reason}){hint}; "
            "if a directory is meant, check its path; if the hub is, the connection"
        )
