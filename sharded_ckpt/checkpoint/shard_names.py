"""How shards are named: as Hugging Face names them, and so that no other save gives the same name."""

from __future__ import annotations

import os
import re

SUFFIX = ".safetensors"

SHARD = re.compile(
    r"(?P<stem>.+?)(?:-(?P<token>[0-9a-f]{8}))?-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.safetensors",
    re.DOTALL,
)
"""The name of a shard, with or without what makes it unique to one save."""


def shard_name(stem: str, number: int, count: int) -> str:
    """Return the name that Hugging Face gives a shard.

    Example:
        >>> shard_name("model", 1, 3)
        'model-00001-of-00003.safetensors'
    """
    return f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}"


def with_token(name: str, token: str) -> str:
    """Return a name for a shard that no other save gives.

    Example:
        >>> with_token("model-00001-of-00002.safetensors", "3f2a"), with_token("sub/ffn.safetensors", "3f2a")
        ('model-3f2a-00001-of-00002.safetensors', 'sub/ffn-3f2a.safetensors')
    """
    if shard := SHARD.fullmatch(name):
        return f"{shard['stem']}-{token}-{shard['number']}-of-{shard['count']}{SUFFIX}"
    stem, extension = os.path.splitext(name)
    return f"{stem}-{token}{extension}"
