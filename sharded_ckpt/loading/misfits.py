"""What is wrong with a checkpoint whose tensors transformers converts: its own errors name no tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchers.names import fold, split_block
from sharded_ckpt.checkpoint.index import CheckpointIndex
from sharded_ckpt.loading.plan import LoadPlan, missing_text

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SHOWN = 4
_HINT = (
    "The config may describe other blocks than the files hold: patchers.infer_block_configs reads the block "
    "configs off the tensor shapes"
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Misfits:
    """Says which tensors of the files do not become those of a model, by the plan of a load.

    Attributes:
        location: The checkpoint.
        plan: Which key feeds what.
        wanted: The shapes of the model's tensors.
        found: The shapes in the files, by key; those of quantised tensors are not in it.
        files: For each key the file that holds it.
    """

    location: str
    plan: LoadPlan
    wanted: Mapping[str, Shape]
    found: Mapping[str, Shape]
    files: Mapping[str, str]

    @classmethod
    def of(
        cls,
        plan: LoadPlan,
        wanted: Mapping[str, Any],
        entries: Mapping[str, Any],
        parts: Mapping[str, Sequence[str]],
        index: CheckpointIndex,
    ) -> Misfits:
        """Collect the shapes of a load.

        Args:
            plan: Which key feeds what.
            wanted: The tensors of the model, which have a shape.
            entries: Those of the files.
            parts: The keys under which each tensor is stored.
            index: Of the checkpoint.
        """
        plain = {key: entry for key, entry in entries.items() if tuple(parts.get(key, ())) == (key,)}
        shapes, found = ({name: tuple(t.shape) for name, t in some.items()} for some in (wanted, plain))
        return cls(index.location, plan, shapes, found, index.weight_map)

    def missing(self, names: Iterable[str]) -> str:
        """Say which tensors of the model nothing feeds."""
        return missing_text(sorted(names), list(self.plan.unexpected), self.location)

    def unlike(self, names: Iterable[str]) -> str:
        """Say which tensors have another shape in the files than in the model."""
        return f"{self._listed(sorted(names), 'do not fit the model')}. {_HINT}"

    def unconverted(self, error: object) -> str:
        """Say which tensors transformers could not put together, as far as their names and shapes tell."""
        names = [name for name, keys in self._keys.items() if self._is_uneven(keys)]
        if not names:
            return f"transformers cannot fit the tensors of {self.location} into the model: {error}. {_HINT}"
        said = self._listed(names, "cannot be put together")
        return f"{said}. The files may lack tensors, or hold some of another size. {_HINT}"

    @property
    def _keys(self) -> dict[str, list[str]]:
        """The keys that become each tensor of the model."""
        keys: dict[str, list[str]] = {}
        for name, key in self.plan.sources.items():
            keys.setdefault(self.plan.target(name), []).append(key)
        return keys

    def _listed(self, names: Sequence[str], what: str) -> str:
        more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = "; ".join(self._said(name) for name in names[:_SHOWN])
        return f"{self.location}: {len(names)} tensors {what}: {shown}{more}"

    def _said(self, name: str) -> str:
        keys = self._keys.get(name, [])
        wants = f"the model wants {self.wanted.get(name)}"
        if len(keys) == 1:
            return f"{keys[0]} in {self.files.get(keys[0])} has shape {self.found.get(keys[0])}, {wants}"
        groups = self._groups(keys).items()
        parts = [f"{len(some)} of shape {shape} ({_folded(some)})" for (_, shape), some in groups]
        where = fold(sorted({self.files.get(key, "") for key in keys}), limit=_SHOWN)
        return f"{name} is made of {' and '.join(parts) or 'nothing'} in {where or 'no file'}, {wants}"

    def _groups(self, keys: Iterable[str]) -> dict[tuple[str, Shape | None], list[str]]:
        """Put together keys that differ in their numbers only, and have one shape."""
        groups: dict[tuple[str, Shape | None], list[str]] = {}
        for key in keys:
            groups.setdefault((_NUMBER.sub("*", key), self.found.get(key)), []).append(key)
        return groups

    def _is_uneven(self, keys: Sequence[str]) -> bool:
        """Whether of several kinds of tensors there are not as many of each, or one kind has two shapes."""
        groups = self._groups(keys)
        return len({kind for kind, _ in groups}) < len(groups) or len({*map(len, groups.values())}) > 1


def _folded(keys: Sequence[str]) -> str:
    """Show keys of one block with the experts, not the block, folded."""
    split = [split_block(key) for key in keys]
    stack, index, _ = split[0] or ("", 0, "")
    return f"{stack}.{index}.{fold(place[2] for place in split if place)}" if all(split) else fold(keys)
