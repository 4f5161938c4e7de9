"""Which key of a checkpoint feeds which tensor of a shard: worked out from names, before anything is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from patchers.errors import CheckpointError, MissingKeysError
from patchers.names import block_of, fold

_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")


@dataclass(frozen=True)
class LoadPlan:
    """What a load will read.

    Attributes:
        sources: The key that feeds each tensor of the shard, by the tensor's name.
        tied: Pairs of names, both fed, that become one parameter if their values are equal.
        unexpected: Keys that no tensor of the whole model wants.
        ignored: Keys that the family says may be left over.
    """

    sources: Mapping[str, str]
    tied: tuple[tuple[str, str], ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelNames:
    """The tensor names of a model, as far as a load depends on them.

    Attributes:
        whole: Of the whole model.
        owned: Of the shard.
        ties: Which name is tied to which (`lm_head.weight` to the embedding).
        prefix: The attribute under which the family keeps its backbone; checkpoints of the backbone alone
            lack it.
        ignorable: A pattern of keys that may be left over.
    """

    whole: Collection[str]
    owned: Collection[str]
    ties: Mapping[str, str]
    prefix: str = ""
    ignorable: str = ""


def plan_load(names: ModelNames, keys: Iterable[str], location: str) -> LoadPlan:
    """Match the names of a model with the keys of a checkpoint.

    A tied name that the checkpoint lacks is fed by its partner. If both are there, both are read, and tied
    only if they turn out equal.

    Raises:
        MissingKeysError: Tensors of the shard that no key feeds.
        CheckpointError: Two keys feed one tensor.
    """
    found, spare = _match(names, keys, location)
    partner = {**names.ties, **{source: target for target, source in names.ties.items()}}
    sources, tied = {}, []
    for name in names.owned:
        if name in found:
            sources[name] = found[name]
        elif partner.get(name) in found:
            sources[name] = found[partner[name]]
    for target, source in names.ties.items():
        if target in sources and source in sources:
            tied.append((target, source))
    missing = [name for name in names.owned if name not in sources]
    if missing:
        raise MissingKeysError(_missing_text(missing, spare, location))
    ignorable = re.compile(names.ignorable) if names.ignorable else None
    ignored = tuple(key for key in spare if ignorable and ignorable.search(key))
    return LoadPlan(sources, tuple(tied), tuple(key for key in spare if key not in set(ignored)), ignored)


def keys_that_may_feed(keys: Iterable[str], owned: Collection[int], unowned: Collection[str]) -> list[str]:
    """Choose the keys that a shard of a family with conversions may need, by their names.

    Args:
        keys: All keys of the checkpoint.
        owned: The blocks of the shard.
        unowned: Modules outside the blocks that the shard does not own, such as `lm_head`.

    Returns:
        The keys of the owned blocks, and of everything outside the blocks that the shard may hold.
    """
    elsewhere = tuple(f"{name}." for name in unowned)
    return [
        key
        for key in keys
        if (not key.startswith(elsewhere) if block_of(key) is None else block_of(key) in owned)
    ]


def unexpected_text(keys: Sequence[str], location: str) -> str:
    """Say which keys nothing wants, and what to do."""
    return (
        f"{location} has {len(keys)} tensors that the model does not want: {fold(keys)}. If the config "
        "removes their blocks on purpose, pass strict=False; else the config may describe another model "
        "than the files"
    )


def _match(names: ModelNames, keys: Iterable[str], location: str) -> tuple[dict[str, str], list[str]]:
    found: dict[str, str] = {}
    spare = []
    whole = names.whole if isinstance(names.whole, (set, frozenset, dict)) else set(names.whole)
    for key in keys:
        name = key if key in whole else _canonical(key, names.prefix)
        if name not in whole:
            spare.append(key)
        elif found.setdefault(name, key) != key:
            raise CheckpointError(
                f"{location}: two keys feed {name}: {found[name]} and {key}; remove one of them"
            )
    return found, spare


def _canonical(key: str, prefix: str) -> str:
    """Return a key without the prefixes of wrappers (torch.compile, DDP), and with that of the backbone."""
    bare = _WRAPPERS.sub("", key)
    return bare if not prefix or bare.startswith(f"{prefix}.") or bare != key else f"{prefix}.{bare}"


def _missing_text(missing: list[str], spare: list[str], location: str) -> str:
    text = f"{location} has no tensors for {len(missing)} of the shard's: {fold(missing)}."
    if spare:
        text += f" It has {len(spare)} that the model does not want: {fold(spare)}."
    return text + (
        " The config may describe another model than the files: patchers.infer_block_configs reads the "
        "block configs off the tensor shapes."
    )
