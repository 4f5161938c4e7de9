"""Which key of a checkpoint feeds which tensor of a shard: worked out from names, before anything is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from patchers.errors import CheckpointError, MissingKeysError
from patchers.names import block_of, fold

_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")


@dataclass(frozen=True)
class LoadPlan:
    """What a load will read.

    Attributes:
        sources: The key that feeds each tensor of the shard, by the name under which it is handed in: that of
            the tensor, or, where transformers converts, a key that becomes the tensor.
        tied: Pairs of names, both fed, that become one parameter if their values are equal.
        unexpected: Keys that no tensor of the whole model wants.
        ignored: Keys that the family says may be left over.
        targets: The tensor that each name becomes, where transformers converts.
    """

    sources: Mapping[str, str]
    tied: tuple[tuple[str, str], ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    targets: Mapping[str, str] = field(default_factory=dict)

    def target(self, name: str) -> str:
        """Return the tensor that is fed by what is handed in under a name."""
        return self.targets.get(name, name)


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
        computed: The buffers that a model computes for itself; old versions saved some of them.
    """

    whole: Collection[str]
    owned: Collection[str]
    ties: Mapping[str, str]
    prefix: str = ""
    ignorable: str = ""
    computed: Collection[str] = ()


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
        raise MissingKeysError(missing_text(missing, spare, location))
    unexpected, ignored = _split({key: key for key in spare}, names)
    return LoadPlan(sources, tuple(tied), unexpected, ignored)


def plan_conversion(names: ModelNames, targets: Mapping[str, str]) -> LoadPlan:
    """Choose the keys that feed a shard whose checkpoint transformers converts.

    Whether nothing is missing, its loader finds out: some keys become several tensors.

    Args:
        names: The tensor names of the model.
        targets: The tensor that each key of the checkpoint becomes, or would, if the model had it.
    """
    sources = {key: key for key, name in targets.items() if name in names.owned}
    key_of = {name: key for key, name in targets.items()}
    partner = {**names.ties, **{source: target for target, source in names.ties.items()}}
    for name in names.owned:
        other = partner.get(name)
        if other in key_of and name not in key_of and other not in names.owned:
            sources[name] = key_of[other]  # one end of a tied pair, without the other
    spare = {key: name for key, name in targets.items() if name not in names.whole}
    unexpected, ignored = _split(spare, names)
    return LoadPlan(sources, (), unexpected, ignored, targets)


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
        name = next((name for name in _readings(key, names.prefix) if name in whole), None)
        if name is None:
            spare.append(key)
        elif found.setdefault(name, key) != key:
            raise CheckpointError(
                f"{location}: two keys feed {name}: {found[name]} and {key}; remove one of them"
            )
    return found, spare


def _split(spare: Mapping[str, str], names: ModelNames) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split keys that nothing wants into those that are unexpected and those that may be left over.

    Args:
        spare: The tensor that each key would become.
        names: Of the model.
    """
    pattern = re.compile(names.ignorable) if names.ignorable else None
    ignored = {
        key: None
        for key, name in spare.items()
        if name in names.computed or (pattern and (pattern.search(key) or pattern.search(name)))
    }
    return tuple(key for key in spare if key not in ignored), tuple(ignored)


def _readings(key: str, prefix: str) -> Iterator[str]:
    """Yield what a key may name: itself, without wrappers (torch.compile, DDP), and in the backbone."""
    yield key
    bare = _WRAPPERS.sub("", key)
    yield bare
    yield f"{prefix}.{bare}"


def missing_text(missing: Sequence[str], spare: Sequence[str], location: str) -> str:
    """Say which tensors no key feeds, and which keys are left over."""
    text = f"{location} has no tensors for {len(missing)} of the shard's: {fold(missing)}."
    if spare:
        text += f" It has {len(spare)} that the model does not want: {fold(spare)}."
    return text + (
        " The config may describe another model than the files: patchers.infer_block_configs reads the "
        "block configs off the tensor shapes."
    )
