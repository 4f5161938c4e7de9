"""JSON of files that nobody may trust."""

from __future__ import annotations

import codecs
import json
from typing import Any

from patchers.errors import CheckpointError


def parse_json(raw: bytes, where: str) -> Any:
    """Parse JSON in which no object gives a name twice.

    Args:
        raw: UTF-8.
        where: Begin of the error: the file.

    Raises:
        CheckpointError: It is no such JSON.
    """
    try:
        return json.loads(raw.removeprefix(codecs.BOM_UTF8).decode(), object_pairs_hook=unique_names)
    except RecursionError:
        raise CheckpointError(f"{where}: JSON nested too deep") from None
    except ValueError as error:
        hint = ""
        if raw.startswith(b"version https://git-lfs"):
            hint = "; it is a git-LFS pointer: run `git lfs pull` in its folder"
        raise CheckpointError(f"{where}: not valid JSON: {error}{hint}") from None


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the dict of a JSON object; ValueError if a name stands in it twice.

    Example:
        >>> unique_names([("a", 1), ("a", 2)])
        Traceback (most recent call last):
        ValueError: 'a' is given twice
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:200]!r} is given twice")
            seen.add(name)
    return found
