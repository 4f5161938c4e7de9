"""Which tensor of a state dict goes to which shard: worked out from names, shapes and dtypes alone.

Every rank works it out from the same tables, so all ranks come to the same plan, or to the same error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from patchers.errors import CheckpointError, ConfigError, MissingKeysError
from patchers.names import fold, fold_indices

_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DDP = re.compile(r"^(?:module\.)+")
_QUANTISED = ("float8", "float4")


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer that a shard owns.

    Attributes:
        names: Its global names; several if it is tied within the shard.
        partners: Names whose tensor may stand in for it: it is tied to them in the whole model.
        shape: Its shape.
        floating: Whether it holds floating-point numbers.
        filled: Whether it holds numbers already: it is not on meta.
    """

    names: tuple[str, ...]
    partners: tuple[str, ...]
    shape: tuple[int, ...]
    floating: bool
    filled: bool


@dataclass(frozen=True)
class Held:
    """A tensor of the state dict.

    Attributes:
        shape: Its shape.
        dtype: Its dtype, as "bfloat16".
        floating: Whether it holds floating-point numbers.
    """

    shape: tuple[int, ...]
    dtype: str
    floating: bool


@dataclass(frozen=True)
class RankTable:
    """What one rank tells the others.

    Attributes:
        slots: What its shard owns.
        brings: Whether it was given a state dict.
        held: That state dict's tensors by global name, on the rank whose state dict counts.
        dtype: What floating-point numbers are to be cast to; None for what they are.
    """

    slots: tuple[Slot, ...]
    brings: bool
    held: dict[str, Held]
    dtype: str | None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RankTable:
        """Return the table that `to_json` was called on."""
        slots = [
            Slot(
                tuple(raw["names"]),
                tuple(raw["partners"]),
                tuple(raw["shape"]),
                raw["floating"],
                raw["filled"],
            )
            for raw in data["slots"]
        ]
        held = {
            key: Held(tuple(raw["shape"]), raw["dtype"], raw["floating"]) for key, raw in data["held"].items()
        }
        return cls(tuple(slots), data["brings"], held, data["dtype"])


@dataclass(frozen=True)
class Distribution:
    """What goes where.

    Attributes:
        keys: For each rank, the key that feeds each of its slots; None for a slot that stays as it is.
        equal: Groups of keys that feed one parameter and must be equal.
        unexpected: Keys that no shard owns.
    """

    keys: tuple[tuple[str | None, ...], ...]
    equal: tuple[tuple[str, ...], ...]
    unexpected: tuple[str, ...]


def plan_distribution(tables: Sequence[RankTable], strict: bool = True) -> Distribution:
    """Work out what goes where.

    Args:
        tables: What each rank tells, in rank order.
        strict: Whether keys that no shard owns are errors, and slots without a key that hold numbers already.

    Raises:
        ConfigError: Not rank 0, and rank 0 alone, brings a state dict.
        MissingKeysError: Shards own tensors that the state dict lacks.
        CheckpointError: Shapes or kinds of numbers differ, or there are keys that no shard owns.

    Example:
        >>> slot = Slot(("a.weight",), (), (2, 3), floating=True, filled=False)
        >>> held = {"a.weight": Held((2, 3), "bfloat16", True)}
        >>> tables = RankTable((), True, held, None), RankTable((slot,), False, {}, None)
        >>> plan_distribution(tables).keys
        ((), ('a.weight',))
    """
    _check_who_brings(tables)
    held = tables[0].held
    keys = tuple(tuple(_key_of(slot, held) for slot in table.slots) for table in tables)
    wanted = {name for table in tables for slot in table.slots for name in slot.names} | set().union(*keys)
    unexpected = tuple(key for key in held if key not in wanted)
    _check_missing(tables, keys, unexpected, strict)
    _check_fit(tables, keys)
    if strict and unexpected:
        raise CheckpointError(
            f"the state dict has {len(unexpected)} tensors that no shard owns: {fold(unexpected)}. "
            "Pass strict=False to leave them out"
        )
    groups = {tuple(name for name in slot.names if name in held) for table in tables for slot in table.slots}
    return Distribution(keys, tuple(sorted(group for group in groups if len(group) > 1)), unexpected)


def global_name(key: str) -> str:
    """Return a tensor name without what wrappers (torch.compile, DDP, FSDP, checkpointing) put into it.

    Example:
        >>> global_name("module._orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.weight")
        'model.layers.0.mlp.weight'
    """
    return _DDP.sub("", _WRAPPERS.sub("", key))


def global_names(keys: Iterable[str], where: str) -> dict[str, str]:
    """Return the global name of each key.

    Raises:
        CheckpointError: Two keys have the same global name, or one is no string.
    """
    keys = list(keys)
    if odd := [key for key in keys if not isinstance(key, str)]:
        raise CheckpointError(f"{where} has a tensor named {odd[0]!r:.80}; names of tensors are strings")
    names = {key: global_name(key) for key in keys}
    twice = {name for name, count in Counter(names.values()).items() if count > 1}
    if twice:
        clash = sorted(key for key, name in names.items() if name in twice)
        raise CheckpointError(
            f"{where} has several tensors of one name: {', '.join(clash)}; remove all but one"
        )
    return names


def _key_of(slot: Slot, held: Mapping[str, Held]) -> str | None:
    return next((name for name in (*slot.names, *slot.partners) if name in held), None)


def _check_who_brings(tables: Sequence[RankTable]) -> None:
    ranks = [rank for rank, table in enumerate(tables) if table.brings]
    if ranks != [0]:
        found = f"rank {fold_indices(ranks)} of {len(tables)}" if ranks else "no rank"
        raise ConfigError(f"rank 0, and rank 0 alone, must be given the state dict; {found} was given one")


def _check_missing(
    tables: Sequence[RankTable],
    keys: Sequence[Sequence[str | None]],
    unexpected: Sequence[str],
    strict: bool,
) -> None:
    missing = {}
    for rank, (table, chosen) in enumerate(zip(tables, keys, strict=True)):
        pairs = zip(table.slots, chosen, strict=True)
        names = [slot.names[0] for slot, key in pairs if key is None and (strict or not slot.filled)]
        if names:
            missing[rank] = names
    if missing:
        owners = "; ".join(f"rank {rank} owns {fold(names)}" for rank, names in missing.items())
        total = sum(map(len, missing.values()))
        text = f"the state dict lacks {total} tensors: {owners}."
        if unexpected:
            text += f" It has {len(unexpected)} that no shard owns: {fold(unexpected)}."
        raise MissingKeysError(text + " Does it come from another model, or from a part of this one?")


def _check_fit(tables: Sequence[RankTable], keys: Sequence[Sequence[str | None]]) -> None:
    wrong = []
    for rank, (table, chosen) in enumerate(zip(tables, keys, strict=True)):
        for slot, key in zip(table.slots, chosen, strict=True):
            if key is not None and (why := _misfit(slot, tables[0].held[key], rank, table.dtype)):
                wrong.append(f"{key} {why}")
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CheckpointError(
            f"{len(wrong)} tensors of the state dict do not fit: {'; '.join(wrong[:4])}{more}. The model may "
            "be built from other block configs: patchers.infer_block_configs reads them off tensor shapes"
        )


def _misfit(slot: Slot, held: Held, rank: int, dtype: str | None) -> str | None:
    if held.shape != slot.shape:
        return f"has shape {held.shape}, the shard of rank {rank} wants {slot.shape}"
    if held.floating != slot.floating:
        kinds = {True: "floating-point numbers", False: "integers"}
        return f"is {held.dtype}, the shard of rank {rank} wants {kinds[slot.floating]}"
    if dtype is not None and held.dtype.startswith(_QUANTISED):
        return f"is {held.dtype}, which is quantised and not cast blindly to {dtype}"
    return None
