"""Folders that are costly to make, made once: staged beside their place, then renamed into it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from patchers.errors import CheckpointError, ConfigError

RECORD = "made.json"  # in every such folder: from what it was made, and the size of each file in bytes


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where this project keeps what it fetched.

    Args:
        cache_dir: Wins over everything. Otherwise `$SHARDED_CKPT_CACHE`, or `sharded-ckpt` under
            `$XDG_CACHE_HOME`, or `~/.cache/sharded-ckpt`.

    Example:
        >>> cache_root("/var/cache/models").as_posix()
        '/var/cache/models'
    """
    chosen = cache_dir or os.environ.get("SHARDED_CKPT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sharded-ckpt"


def cached_folder(folder: Path, recipe: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """Return `folder`, after making it if it is not there, not whole, or was made from another recipe.

    Nobody sees a half-made folder: it is made beside its place and renamed. Of two processes that make the
    same folder at once, the second finds it made and takes it.

    Args:
        folder: Where it shall be. An existing folder that this function did not make is never touched.
        recipe: What the content depends on, as JSON values.
        make: Fills the empty folder that it is given; its parent is thrown away afterwards, so scratch files
            may go there.

    Raises:
        ConfigError: Something else is in the way.
    """
    if not _is_whole(folder, recipe):
        _refuse_foreign(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            stage = Path(scratch) / folder.name
            stage.mkdir()
            make(stage)
            _record(stage, recipe)
            _publish(stage, folder, recipe)
    return folder


def _record(stage: Path, recipe: Mapping[str, Any]) -> None:
    files = [file for file in sorted(stage.iterdir()) if file.is_file()]
    made = {"recipe": dict(recipe), "files": {file.name: file.stat().st_size for file in files}}
    record = stage / RECORD
    record.write_text(json.dumps(made, indent=2) + "\n")
    for file in files:  # safetensors makes its files 0600; the record has what the umask gives
        if not file.is_symlink() and file.stat().st_nlink == 1:  # what is linked belongs to another folder
            file.chmod(record.stat().st_mode)


def _is_whole(folder: Path, recipe: Mapping[str, Any]) -> bool:
    try:
        made = json.loads((folder / RECORD).read_text())
        sizes = {name: (folder / name).stat().st_size for name in made["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return made.get("recipe") == dict(recipe) and made["files"] == sizes


def _refuse_foreign(folder: Path) -> None:
    ours = (folder / RECORD).is_file()
    if folder.exists() and not ours and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"{folder} exists and is not a folder that the demo made: it has no {RECORD}. "
            "Move it away, or name another place."
        )


def _publish(stage: Path, folder: Path, recipe: Mapping[str, Any]) -> None:
    for _ in range(3):  # another process may put its folder there between our looking and our renaming
        try:
            os.rename(stage, folder)  # replaces an empty folder, never a full one
            return
        except OSError:
            if _is_whole(folder, recipe):
                return
            _refuse_foreign(folder)
            with tempfile.TemporaryDirectory(prefix="old.", dir=stage.parent) as grave:
                shutil.move(folder, grave)
    raise CheckpointError(
        f"{folder} cannot be replaced: other processes keep writing it. Try again when they end."
    )
