"""Tensors that several ranks have, or that are tied: who writes what. Pure data, the same on all ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from patchers.errors import CheckpointError, MissingKeysError
from patchers.names import block_of, fold, fold_indices
from sharded_ckpt.checkpoint.layout import TensorSpec

_FLOATS: Final = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Share:
    """What one rank has, as the other ranks must know it.

    Attributes:
        tensors: Dtype and shape of each tensor.
        unowned: The modules that are stubs there; None if it has a dict, which knows no modules.
        ties: Which name the config ties to which.
        alike: Those of the tied names that hold, there, just what their partner holds.
    """

    tensors: Mapping[str, TensorSpec]
    unowned: tuple[str, ...] | None
    ties: Mapping[str, str]
    alike: tuple[str, ...]

    def to_plain(self) -> dict[str, Any]:
        """Return what `from_plain` reads, after it has travelled as JSON."""
        return asdict(self)

    @classmethod
    def from_plain(cls, said: Mapping[str, Any]) -> Share:
        """Return what `to_plain` was called on."""
        tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in said["tensors"].items()}
        unowned = None if said["unowned"] is None else tuple(said["unowned"])
        return cls(tensors, unowned, said["ties"], tuple(said["alike"]))


@dataclass(frozen=True)
class Division:
    """Who writes what.

    Attributes:
        writers: The one rank that writes each tensor.
        untied: Tied names that hold something else than their partner, and so are written, too.
    """

    writers: Mapping[str, int]
    untied: Mapping[str, str]


class Shares:
    """The shares of all ranks.

    Args:
        shares: Of every rank, in rank order.

    Raises:
        MissingKeysError: Parts of the model are a stub on every rank, or there is nothing at all.
        CheckpointError: Ranks have tensors of one name that differ in dtype or shape.
    """

    def __init__(self, shares: Sequence[Share]) -> None:
        self._shares = shares
        self.holders: dict[str, list[int]] = {}
        self.tensors: dict[str, TensorSpec] = {}
        for rank, share in enumerate(shares):
            for name, spec in share.tensors.items():
                self.holders.setdefault(name, []).append(rank)
                self.tensors.setdefault(name, spec)
        self.ties = {
            target: source
            for share in shares
            for target, source in share.ties.items()
            if target in self.holders and source in self.holders
        }
        self._refuse_incomplete()
        self._refuse_unlike(lambda rank, name: "{} {}".format(*shares[rank].tensors[name]))

    @property
    def uncertain(self) -> list[str]:
        """The tensors whose bytes must be compared before it is known who writes them."""
        several = {name for name, ranks in self.holders.items() if len(ranks) > 1}
        apart = {pair for pair in self.ties.items() if not self._is_alike(pair[0])}
        return sorted(several.union(*apart))

    @property
    def dtype(self) -> str | None:
        """The dtype of the model, as transformers tells it: that of its first floating-point tensor."""
        order = sorted(self._shares, key=lambda share: min(_blocks_of(share), default=sys.maxsize))
        dtypes = (dtype for share in order for dtype, _ in share.tensors.values())
        return next((_FLOATS[dtype] for dtype in dtypes if dtype in _FLOATS), None)

    def divide(self, digests: Sequence[Mapping[str, str]]) -> Division:
        """Say who writes what: of several ranks the lowest one, and of tied names the partner's.

        If some tied names have diverged, the config will call none tied, and all of them are written.

        Args:
            digests: Of every rank those of its `uncertain` tensors.

        Raises:
            CheckpointError: Ranks have tensors of one name with different values.
        """
        self._refuse_unlike(lambda rank, name: digests[rank][name], "different values")
        known = {name: text for said in digests for name, text in said.items()}
        untied = {
            target: source
            for target, source in self.ties.items()
            if not self._is_alike(target) and known[target] != known[source]
        }
        left_out = set() if untied else set(self.ties)
        writers = {name: ranks[0] for name, ranks in self.holders.items() if name not in left_out}
        return Division(writers, untied)

    def _is_alike(self, target: str) -> bool:
        return all(target in self._shares[rank].alike for rank in self.holders[target])

    def _refuse_incomplete(self) -> None:
        if not self.holders:
            raise MissingKeysError("there is nothing to save: no rank has a tensor")
        stubs = [set(share.unowned) for share in self._shares if share.unowned is not None]
        nowhere = set.intersection(*stubs) if stubs else set()
        if left := [name for name in nowhere if not any(key.startswith(f"{name}.") for key in self.holders)]:
            raise MissingKeysError(
                f"no rank owns {fold(left)}: the checkpoint would not be whole. Save from all ranks that "
                "together own the model; to write a part of it on purpose, pass its state_dict()"
            )

    def _refuse_unlike(self, said: Callable[[int, str], str], what: str = "") -> None:
        """Raise if ranks say different things of one tensor.

        Args:
            said: What a rank says of a name.
            what: How to show it, if not as it is.
        """
        unlike: dict[str, list[str]] = {}
        for name, ranks in self.holders.items():
            views: dict[str, list[int]] = {}
            for rank in ranks if len(ranks) > 1 else ():
                views.setdefault(said(rank, name), []).append(rank)
            if len(views) > 1:
                shown = {what: ranks} if what else views
                text = ", ".join(f"{view} on rank {fold_indices(who)}" for view, who in shown.items())
                unlike.setdefault(text, []).append(name)
        if unlike:
            texts = "; ".join(f"{fold(names)}: {text}" for text, names in unlike.items())
            raise CheckpointError(
                f"ranks have tensors of one name that are not the same: {texts}. A tensor belongs to one "
                "rank, or must be equal on all that have it. Where each rank holds its part of a larger one, "
                "such as its own experts, say so: DTensor.from_local(part, mesh, [Shard(0)])"
            )


def _blocks_of(share: Share) -> Iterator[int]:
    return (block for block in map(block_of, share.tensors) if block is not None)
