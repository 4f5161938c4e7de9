"""The small files of a checkpoint that its successor takes over: by explicit rules, and never weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from patchers.dialects import (
    CONFIG_FIELDS,
    Dialect,
    decoder_fields,
    detect_dialect,
    fields_present,
    write_block_configs,
)
from patchers.errors import ConfigError
from patchers.families import NATIVE_FAMILY, OWN_PER_LAYER_CONFIG
from sharded_ckpt.checkpoint.local import LocalSource
from sharded_ckpt.checkpoint.source import read_json

if TYPE_CHECKING:
    from patchers.block_config import BlockConfig
    from sharded_ckpt.checkpoint.publish import Transaction
    from sharded_ckpt.checkpoint.source import TensorSource

GENERATION_CONFIG: Final = "generation_config.json"
TEMPLATES: Final = "additional_chat_templates"

CARRIED: Final = (
    GENERATION_CONFIG,
    # what tokenizers are saved as, and the vocabularies of those that bring their own code
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "chat_template*.jinja",
    "chat_template*.json",
    "*processor_config.json",
    # the terms under which the weights may be passed on
    "LICENSE*",
    "NOTICE*",
)
"""Patterns of the names, at the top of a checkpoint, that are carried over."""

CODE: Final = "*.py"
"""Carried over too where an `auto_map` of the checkpoint says that there is code to it."""

NEVER_CARRIED: Final = (
    ".*",
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "*.index.json",
    "config.json",
)
"""Patterns of names that are not carried over even if they fit: weights, their indexes, hidden files."""

_TELLING: Final = ("config.json", "tokenizer_config.json")

READABLE_AS_DECILM: Final = (Dialect.NEMOTRON_NAS, Dialect.TRANSITIONAL)


def carried_names(source: TensorSource) -> list[str]:
    """Return the files of a checkpoint that its successor takes over, sorted."""
    names = [name for name in source.names() if not _fits(name, NEVER_CARRIED)]
    patterns = (*CARRIED, CODE) if _has_code(source) else CARRIED
    return [name for name in names if _fits(name, patterns)] + _more_templates(source)


def carry_files(
    save: Transaction, source: TensorSource, *, but: Collection[str] = (), folder: str = ""
) -> list[str]:
    """Copy into a save what it takes over from a checkpoint; one rank does so.

    Args:
        save: The save, while it is prepared.
        source: The checkpoint. What is not on this machine is downloaded.
        but: Names that the save writes itself.
        folder: Where in the save they go, if not at its top: a path that ends in `/`.

    Returns:
        The names of the copied files.
    """
    names = [name for name in carried_names(source) if name not in but]
    source.ensure(names)
    for name in names:
        save.copy(source.local_path(name), f"{folder}{name}")
    return names


def config_saying(
    raw: Mapping[str, Any], blocks: Sequence[BlockConfig], dialect: Dialect | str | None = None
) -> dict[str, Any]:
    """Return the content of a config.json with its blocks exchanged for others; `raw` stays as it is.

    Args:
        raw: The content of a config.json.
        blocks: One for each layer.
        dialect: In which to say them; by default the one that `raw` is in, or AnyModel where it is in none.

    Raises:
        BlockConfigError: The dialect cannot say a block; the message names block and field.
        ConfigError: A `nemotron-nas` config in a dialect that the code published with it cannot read, or a
            family that keeps other things in the dialect's field.

    Example:
        >>> from patchers import BlockConfig, FFNConfig
        >>> raw = {"num_hidden_layers": 1, "num_key_value_heads": 8, "intermediate_size": 64}
        >>> config_saying(raw, [BlockConfig(ffn=FFNConfig(32))], "per-layer")["per_layer_config"]
        {'0': {'intermediate_size': 32}}
    """
    dialect = Dialect(dialect or detect_dialect(raw) or Dialect.ANYMODEL)
    family = raw.get("model_type")
    if family in NATIVE_FAMILY and dialect not in READABLE_AS_DECILM:
        raise ConfigError(
            f"a {family} config cannot say its blocks in {dialect.value}, which the code published with it "
            f"does not read; use {' or '.join(known.value for known in READABLE_AS_DECILM)}, or the native "
            "config that load_model_config gives"
        )
    if family in OWN_PER_LAYER_CONFIG and dialect is Dialect.PER_LAYER:
        raise ConfigError(
            f"{family} says other things in per_layer_config itself, so its blocks cannot be said there; use "
            f"another dialect, such as {Dialect.ANYMODEL.value}"
        )
    said = {name for name in CONFIG_FIELDS if raw.get(name) is None or name in fields_present(raw)}
    kept = {name: value for name, value in raw.items() if name not in said}
    return {**kept, **write_block_configs(blocks, dialect, decoder_fields(raw))}


def _has_code(source: TensorSource) -> bool:
    return any(source.exists(name) and "auto_map" in read_json(source, name) for name in _TELLING)


def _more_templates(source: TensorSource) -> list[str]:
    """Return the chat templates that a tokenizer has beside its main one, in the only folder that is read."""
    if not isinstance(source, LocalSource):
        return []
    found = (source.directory / TEMPLATES).glob("*.jinja")
    return sorted(f"{TEMPLATES}/{path.name}" for path in found if not path.name.startswith("."))


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
