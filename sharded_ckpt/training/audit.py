"""What a model wants and what a checkpoint has, compared before anything is touched. Pure data.

Beware of two meanings of one word. To `torch.nn.Module`, and in the reports here, a key is *missing* when the
model wants it and the checkpoint lacks it, and *unexpected* when the checkpoint has it and nobody wants it.
The names of the strictness modes come from Megatron, where it is the other way round.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from patchers.errors import CheckpointError, MissingKeysError
from patchers.names import fold, fold_indices
from sharded_ckpt.checkpoint.coordinator import Coordinator
from sharded_ckpt.checkpoint.layout import TensorSpec
from sharded_ckpt.checkpoint.writer import DTYPE_NAMES
from sharded_ckpt.training.choice import choice_of
from sharded_ckpt.training.places import is_extra_state

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class StrictHandling(Enum):
    """What to do about keys that one side lacks.

    `..._UNEXPECTED` is about keys that a rank asks for and the checkpoint lacks; `..._ALL` also about keys of
    the checkpoint that no rank asks for.
    """

    ASSUME_OK_UNEXPECTED = "assume_ok_unexpected"
    """Compare nothing: what is asked for and not there is an error of the reader."""
    LOG_UNEXPECTED = "log_unexpected"
    LOG_ALL = "log_all"
    RAISE_UNEXPECTED = "raise_unexpected"
    RAISE_ALL = "raise_all"
    RETURN_UNEXPECTED = "return_unexpected"
    RETURN_ALL = "return_all"
    IGNORE_ALL = "ignore_all"
    """Leave what is not there as it is in the model, without a word."""

    @classmethod
    def of(cls, mode: StrictHandling | str) -> StrictHandling:
        """Return the mode of a name.

        Raises:
            ConfigError: There is no such mode.
        """
        return choice_of(cls, mode, "strictness")

    @property
    def raises_on_missing(self) -> bool:
        """Whether a key that the model wants and the checkpoint lacks is an error."""
        return self in (self.ASSUME_OK_UNEXPECTED, self.RAISE_UNEXPECTED, self.RAISE_ALL)

    @property
    def looks_at_unexpected(self) -> bool:
        """Whether keys of the checkpoint that nobody wants are looked for at all."""
        return self in (self.LOG_ALL, self.RAISE_ALL, self.RETURN_ALL)


@dataclass(frozen=True)
class Wanted:
    """A tensor of a model, as it is looked for in a checkpoint.

    Attributes:
        names: Its names here; several if it is tied.
        partners: Names whose tensor serves as well: it is tied to them in the whole model.
        spec: Its dtype, as safetensors calls it, and its shape.
    """

    names: tuple[str, ...]
    partners: tuple[str, ...]
    spec: TensorSpec


@dataclass(frozen=True)
class FillPlan:
    """Which key feeds what.

    Attributes:
        sources: For each tensor that is wanted its key; None if there is none.
        equal: Groups of keys that stand for one tensor of the model, and must hold the same values.
        missing: Names of the tensors without a key.
        used: The keys that this rank has a place for.
        cast: Names of tensors whose dtype changes, by `"found -> wanted"`.
    """

    sources: tuple[str | None, ...]
    equal: tuple[tuple[str, ...], ...] = ()
    missing: tuple[str, ...] = ()
    used: frozenset[str] = frozenset()
    cast: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def consumers(self) -> dict[str, list[int]]:
        """The numbers of the tensors that each key feeds."""
        feeds: dict[str, list[int]] = {}
        for number, key in enumerate(self.sources):
            if key is not None:
                feeds.setdefault(key, []).append(number)
        return feeds


@dataclass(frozen=True)
class FillReport:
    """What a load did. True when nothing was odd. Words are those of `torch.nn.Module.load_state_dict`.

    Attributes:
        filled: How many tensors were filled on this rank.
        missing: What the model wants and the checkpoint lacks: left as it was. Over all ranks, if several
            loaded.
        unexpected: What the checkpoint has and no rank wants, as far as the strictness asked for it.
        cast: Names of tensors whose dtype was changed, by `"found -> wanted"`, on this rank.
        skipped: What was left out on purpose (task heads).
    """

    filled: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not (self.missing or self.unexpected or self.cast)

    def __str__(self) -> str:
        lines = [f"{self.filled} tensors filled"]
        lines += [f"  not in the checkpoint, left as they were: {fold(self.missing)}"] if self.missing else []
        lines += (
            [f"  in the checkpoint, wanted by no rank: {fold(self.unexpected)}"] if self.unexpected else []
        )
        lines += [f"  cast {kind}: {fold(names)}" for kind, names in self.cast.items()]
        lines += [f"  left out: {fold(self.skipped)}"] if self.skipped else []
        return "\n".join(lines)


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Return dtype and shape of a tensor, as a file would tell them."""
    return DTYPE_NAMES[str(tensor.dtype)], tuple(tensor.shape)


def plan_fill(wanted: Sequence[Wanted], found: Mapping[str, TensorSpec], where: str) -> FillPlan:
    """Work out which key feeds which tensor.

    Args:
        wanted: The tensors of the model.
        found: Dtype and shape of each tensor of the checkpoint.
        where: The checkpoint, for errors.

    Raises:
        CheckpointError: Shapes differ, or numbers of one kind are wanted where another is found.

    Example:
        >>> tied = Wanted(("lm_head.weight",), ("embed.weight",), ("BF16", (8, 4)))
        >>> plan = plan_fill([tied], {"embed.weight": ("F32", (8, 4))}, "ckpt")
        >>> plan.sources, dict(plan.cast)
        (('embed.weight',), {'F32 -> BF16': ('lm_head.weight',)})
    """
    sources = tuple(
        next((name for name in (*item.names, *item.partners) if name in found), None) for item in wanted
    )
    groups = (tuple(name for name in item.names if name in found) for item in wanted)
    pairs = [(item, key) for item, key in zip(wanted, sources, strict=True) if key is not None]
    wrong = [
        f"{item.names[0]} {why}" for item, key in pairs if (why := _misfit(item.spec, found[key])) is not None
    ]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CheckpointError(
            f"{where}: {len(wrong)} tensors do not fit the model: {'; '.join(wrong[:4])}{more}. The model "
            "may be built from other block configs than the one that was saved; nothing was loaded"
        )
    cast: dict[str, tuple[str, ...]] = {}
    for item, key in pairs:
        if found[key][0] != item.spec[0]:
            kind = f"{found[key][0]} -> {item.spec[0]}"
            cast[kind] = (*cast.get(kind, ()), item.names[0])
    return FillPlan(
        sources,
        tuple(group for group in groups if len(group) > 1),
        tuple(item.names[0] for item, key in zip(wanted, sources, strict=True) if key is None),
        frozenset(name for item in wanted for name in (*item.names, *item.partners) if name in found),
        cast,
    )


def audit_keys(
    plan: FillPlan,
    keys: Iterable[str],
    strictness: StrictHandling,
    control: Coordinator,
    where: str,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compare what all ranks want with what the checkpoint has; collective.

    The extra states of modules are let pass, whichever side lacks them, and nothing else is.

    Args:
        plan: Of this rank.
        keys: Of the checkpoint.
        strictness: What to do about what one side lacks.
        control: All ranks.
        where: The checkpoint, for errors.

    Returns:
        What is missing on any rank, and what no rank wants.

    Raises:
        MissingKeysError: Some rank wants keys that are not there; the same on all ranks.
        CheckpointError: No rank wants some keys; or there is not one key that any rank wants.
    """
    said = control.gather(
        {"missing": list(plan.missing), "used": sorted(plan.used), "wants": len(plan.sources)},
        f"comparing what the ranks want with {where}",
    )
    missing = {rank: [k for k in told["missing"] if not is_extra_state(k)] for rank, told in enumerate(said)}
    missing = {rank: names for rank, names in missing.items() if names}
    used = {key for told in said for key in told["used"]}
    unexpected = tuple(key for key in keys if key not in used and not is_extra_state(key))
    absent = tuple(dict.fromkeys(name for names in missing.values() for name in names))
    if not used and any(told["wants"] for told in said):
        raise CheckpointError(
            f"{where}: none of its {len(unexpected)} tensors is one of the model: it has {fold(unexpected)}, "
            f"wanted are {fold(absent)}. Are the names those of another form of the model?"
        )
    _judge(missing, unexpected, strictness, where)
    return absent, unexpected if strictness.looks_at_unexpected else ()


def _judge(
    missing: Mapping[int, Sequence[str]], unexpected: Sequence[str], strictness: StrictHandling, where: str
) -> None:
    texts = []
    if missing:
        ranks = fold_indices(missing)
        names = fold(name for wanted in missing.values() for name in wanted)
        texts.append(f"the model wants, on rank {ranks}, and the checkpoint lacks: {names}")
    if unexpected and strictness.looks_at_unexpected:
        texts.append(f"the checkpoint has, and no rank wants: {fold(unexpected)}")
    text = f"{where}: {'; '.join(texts)}"
    if missing and strictness.raises_on_missing:
        raise MissingKeysError(f"{text}. Nothing was loaded; see `strictness` for loading a part on purpose")
    if texts and strictness is StrictHandling.RAISE_ALL:
        raise CheckpointError(f"{text}. Nothing was loaded; see `strictness` for loading a part on purpose")
    if texts and strictness in (StrictHandling.LOG_UNEXPECTED, StrictHandling.LOG_ALL):
        logger.warning("%s", text)


def _misfit(wanted: TensorSpec, found: TensorSpec) -> str | None:
    if wanted[1] != found[1]:
        return f"has shape {found[1]} in the checkpoint, the model wants {wanted[1]}"
    if wanted[0] != found[0] and not {wanted[0], found[0]} <= _FLOATS:
        return f"is {found[0]} in the checkpoint and {wanted[0]} in the model, which is not cast blindly"
    return None
