"""Whether a checkpoint is whole: index, headers, files and manifest against each other, and its values."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from patchers.errors import CheckpointError, CheckpointNotFoundError
from patchers.names import fold
from patchers.tables import as_html
from sharded_ckpt.checkpoint.header import Header
from sharded_ckpt.checkpoint.index import CheckpointIndex, open_index
from sharded_ckpt.checkpoint.manifest import MANIFEST_FILE, FileDigest, Manifest, parse_manifest
from sharded_ckpt.checkpoint.repair import rebuild_index
from sharded_ckpt.checkpoint.source import TensorSource, find_config, open_source, read_source_header
from sharded_ckpt.checkpoint.workspace import unfinished

if TYPE_CHECKING:
    import torch

__all__ = ["Problem", "VerifyReport", "rebuild_index", "verify"]

Progress = Callable[[int], object]

_READ_BYTES: Final = 8 << 20
_ALWAYS_FINITE: Final = ("F4", "F6_E2M3", "F6_E3M2")
"""Dtypes without NaN and infinities, of which torch lacks some: nothing needs to be read."""
_HASHERS: Final = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    text: str
    """What is wrong, expected and found."""
    file: str | None = None
    """The file, relative to the checkpoint."""
    keys: tuple[str, ...] = ()
    """The tensors."""

    def __str__(self) -> str:
        keys = f": {fold(self.keys)}" if self.keys else ""
        return f"{self.file}: {self.text}{keys}" if self.file else f"{self.text}{keys}"


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and what was found; true if nothing is wrong."""

    location: str
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    """What is not wrong, but worth knowing."""
    files: int = 0
    """How many files hold tensors."""
    tensors: int = 0
    nbytes: int = 0
    """Bytes of all tensors."""

    def __bool__(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        size = f"{self.tensors} tensors, {self.nbytes} bytes in {self.files} files"
        head = (
            f"{self.location}: {len(self.problems) or 'no'} problem{'s'[: len(self.problems) != 1]} ({size})"
        )
        return "\n  ".join([head, *map(str, self.problems), *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return as_html([str(self)])


class _Findings:
    """Problems and notes as they come up."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.headers: dict[str, Header] = {}

    def add(self, text: str, file: str | None = None, keys: Any = ()) -> None:
        self.problems.append(Problem(text, file, tuple(keys)))

    @contextmanager
    def catch(self, file: str | None = None) -> Iterator[None]:
        """Take down an error instead of stopping there."""
        try:
            yield
        except CheckpointError as error:
            self.add(str(error), file)


def verify(
    checkpoint: str | os.PathLike[str] | TensorSource,
    *,
    manifest: bool = True,
    finite: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a checkpoint without a model: everything that can be known from its files.

    Args:
        checkpoint: As `open_source` takes it, or a source.
        manifest: Whether to read all files and compare them with `manifest.json`, if there is one.
        finite: Whether to look for NaN and infinities in all floating tensors; this imports torch.
        progress: Called with the bytes read since the last call, possibly by several threads.

    Returns:
        What is wrong, all of it: one broken file does not hide another.

    Raises:
        CheckpointNotFoundError: There is nothing at that place.
    """
    source = checkpoint if isinstance(checkpoint, TensorSource) else open_source(checkpoint)
    findings = _Findings()
    index = _check_index(source, findings)
    if index is not None:
        _check_files(source, index, findings)
    _check_surroundings(source, index, findings)
    if manifest:
        _check_manifest(source, index, findings, progress)
    if finite and index is not None:
        _check_finite(source, index, findings, progress)
    entries = [entry for header in findings.headers.values() for entry in header.tensors.values()]
    nbytes = sum(entry.nbytes for entry in entries)
    notes, problems = tuple(findings.notes), tuple(findings.problems)
    return VerifyReport(source.location, problems, notes, len(findings.headers), len(entries), nbytes)


def _check_index(source: TensorSource, findings: _Findings) -> CheckpointIndex | None:
    try:
        return open_index(source)
    except CheckpointNotFoundError:
        if source.exists(MANIFEST_FILE):
            findings.notes.append("no tensors at the top; only what the manifest lists was checked")
            return None
        raise
    except CheckpointError as error:
        findings.add(str(error))
        return None


def _check_files(source: TensorSource, index: CheckpointIndex, findings: _Findings) -> None:
    """Compare what the index says with what the headers say."""
    groups = index.by_file()
    missing = source.missing(groups)
    for file in missing:
        findings.add("does not exist; the index says that it holds", file, groups[file])
    for file in groups:
        if file not in missing:
            with findings.catch():
                findings.headers[file] = read_source_header(source, file)
    for file, header in findings.headers.items():
        if ghosts := [key for key in groups[file] if key not in header.tensors]:
            findings.add("lacks tensors that the index says it holds", file, ghosts)
        if strays := [key for key in header.tensors if key not in index.weight_map]:
            findings.add("holds tensors that the index does not list", file, strays)
    _check_homes(findings)
    _check_size(index, findings)


def _check_homes(findings: _Findings) -> None:
    homes: dict[str, list[str]] = {}
    for file, header in findings.headers.items():
        for key in header.tensors:
            homes.setdefault(key, []).append(file)
    twice: dict[str, list[str]] = {}
    for key, files in homes.items():
        if len(files) > 1:
            twice.setdefault(", ".join(files), []).append(key)
    for where, keys in twice.items():
        findings.add(f"{where} all hold", None, keys)


def _check_size(index: CheckpointIndex, findings: _Findings) -> None:
    if len(findings.headers) < len(index.files) or index.file is None:
        return
    found = sum(
        findings.headers[file].tensors[key].nbytes
        for key, file in index.weight_map.items()
        if key in findings.headers[file].tensors
    )
    if index.total_size is None:
        findings.notes.append(f"{index.file} gives no total_size")
    elif index.total_size != found:
        findings.add(f"total_size is {index.total_size} bytes, the tensors have {found}", index.file)


def _check_surroundings(source: TensorSource, index: CheckpointIndex | None, findings: _Findings) -> None:
    """Look for what does not belong to the checkpoint, and for saves that are not through."""
    listed = set(index.files) if index else set()
    others = [name for name in source.names() if name.endswith(".safetensors") and name not in listed]
    if index is not None and others:
        findings.notes.append(f"the index does not list {', '.join(others)}")
    with findings.catch():
        find_config(source)
    directory = getattr(source, "directory", None)
    if directory is not None and (workspace := unfinished(directory)):
        findings.add(
            f"a save is changing names here, or died while it did ({workspace}); the next save finishes it, "
            "or `recover` of sharded_ckpt.checkpoint.publish"
        )


def _check_manifest(
    source: TensorSource, index: CheckpointIndex | None, findings: _Findings, progress: Progress | None
) -> None:
    if not source.exists(MANIFEST_FILE):
        findings.notes.append("no manifest: the bytes of tensors were not checked")
        return
    with findings.catch():
        manifest = parse_manifest(source.read_bytes(MANIFEST_FILE), f"{source.location}/{MANIFEST_FILE}")
        if unlisted := [file for file in (index.files if index else ()) if file not in manifest.files]:
            findings.add(f"does not list {', '.join(unlisted)}", MANIFEST_FILE)
        _compare_digests(source, manifest, findings, progress)


def _compare_digests(
    source: TensorSource, manifest: Manifest, findings: _Findings, progress: Progress | None
) -> None:
    missing = source.missing(manifest.files)
    for file in missing:
        findings.add("does not exist; the manifest lists it", file)
    present = [file for file in manifest.files if file not in missing]
    source.ensure(present)
    with ThreadPoolExecutor(_HASHERS) as pool:
        wanted = [manifest.files[file] for file in present]
        texts = pool.map(lambda file, digest: _compare(source, file, digest, progress), present, wanted)
        for file, text in zip(present, texts, strict=True):
            if text:
                findings.add(text, file)


def _compare(source: TensorSource, file: str, wanted: FileDigest, progress: Progress | None) -> str | None:
    try:
        size = source.size(file)
        if size != wanted.size:
            return f"has {size} bytes, {wanted.size} when it was saved"
        hasher = hashlib.sha256()
        for begin in range(0, size, _READ_BYTES):
            data = source.read_bytes(file, begin, min(begin + _READ_BYTES, size))
            hasher.update(data)
            if progress:
                progress(len(data))
    except CheckpointError as error:
        return str(error)
    if hasher.hexdigest() != wanted.sha256:
        return "has other content than when it was saved: its SHA-256 does not match the manifest"
    return None


def _check_finite(
    source: TensorSource, index: CheckpointIndex, findings: _Findings, progress: Progress | None
) -> None:
    from sharded_ckpt.checkpoint.reader import CheckpointReader

    found = {file: header.tensors for file, header in findings.headers.items()}
    sound = [
        key
        for key, file in index.weight_map.items()
        if key in found.get(file, ()) and found[file][key].dtype not in _ALWAYS_FINITE
    ]
    bad: dict[tuple[str, str], list[str]] = {}
    reader = CheckpointReader(source, index)
    try:
        for key, tensor in reader.iter_tensors(sound):
            for kind in _not_finite(tensor):
                bad.setdefault((index.weight_map[key], kind), []).append(key)
            if progress:
                progress(tensor.nbytes)
    finally:
        reader.close()
    for (file, kind), keys in sorted(bad.items()):
        findings.add(f"holds {kind}", file, keys)


def _not_finite(tensor: torch.Tensor) -> Iterator[str]:
    import torch

    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    found = {"NaN": False, "infinities": False}
    for part in tensor.reshape(-1).split(1 << 20):
        values = part.to(torch.float32) if part.dtype.itemsize == 1 else part
        found["NaN"] |= bool(values.isnan().any())
        found["infinities"] |= bool(values.isinf().any())
    yield from (kind for kind, there in found.items() if there)
