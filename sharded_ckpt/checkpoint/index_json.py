"""The JSON of an index as `json.dumps` writes it, parsed a run of tensors at a time."""

from __future__ import annotations

import re
from itertools import repeat
from typing import Any

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.strict_json import parse_json

_NAME = '"weight_map"'
_START = re.compile(_NAME + r': \{\s*(?="[^"]*": "[^"]*"(?P<comma>, |,\n *)?)')
_MOST_RUNS = 5000
"""Where tensors of one file stand so far apart, the standard library is faster."""

_UNUSUAL = ("\\", "\N{BOM}", *map(chr, {*range(32)} - {ord("\n")}))


def parse_index_json(raw: bytes, where: str) -> Any:
    """Parse the JSON of an index; as `parse_json`, and twice as fast where it is written as usual.

    Args:
        raw: UTF-8.
        where: Begin of the error: the file.

    Raises:
        CheckpointError: It is no JSON, or an object gives a name twice.
    """
    found = _parse_usual(raw, where)
    return parse_json(raw, where) if found is None else found


def _parse_usual(raw: bytes, where: str) -> dict[str, Any] | None:
    """Parse an index whose strings need no escapes; None where anything is unusual or wrong."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    start = _START.search(text)
    if start is None or text.count(_NAME) > 1 or any(character in text for character in _UNUSUAL):
        return None
    comma = start["comma"] or ", "
    found = _parse_runs(text, start.end(), comma)
    if found is None:
        return None
    weight_map, end = found
    # All line ends are between the entries, none is in a name.
    if text.count("\n", start.end(), end) != comma.count("\n") * (len(weight_map) - 1):
        return None
    try:
        top = parse_json((text[: start.end()] + text[end:]).encode(), where)
    except CheckpointError:
        return None
    if not isinstance(top, dict) or top.get("weight_map") != {}:
        return None
    return {**top, "weight_map": weight_map}


def _parse_runs(text: str, position: int, comma: str) -> tuple[dict[str, str], int] | None:
    """Return the entries from a position on, and where they end; None if anything is odd.

    Tensors of one file stand in long runs: the name of the file is read once a run, the rest is one split.
    """
    run = re.compile(rf'"[^"]*": "([^"]*)"(?:{comma}"[^"]*": "\1"){{0,1000}}')
    weight_map: dict[str, str] = {}
    count = 0
    for _ in range(_MOST_RUNS):
        match = run.match(text, position)
        if match is None:
            return None
        file, position = match[1], match.end()
        keys = match[0][1 : -len(f'": "{file}"')].split(f'": "{file}"{comma}"')
        weight_map.update(zip(keys, repeat(file)))
        count += len(keys)
        if not text.startswith(comma, position):
            return (weight_map, position) if len(weight_map) == count else None
        position += len(comma)
    return None
