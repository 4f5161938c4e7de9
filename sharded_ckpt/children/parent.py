"""The parent of a child: what its blocks are, and where their tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from patchers.base_sizes import BaseSizes, said_query_heads
from patchers.block_config import BlockConfig
from patchers.dialects import read_block_configs
from patchers.errors import BlockConfigError, CheckpointError, FamilyError
from patchers.families import PLAIN_FAMILIES
from patchers.inference import infer_block_configs
from patchers.names import fold
from patchers.tensor_roles import role_of
from sharded_ckpt.checkpoint.entry import TensorEntry
from sharded_ckpt.children.recipes import Source

if TYPE_CHECKING:
    from patchers.descriptor import ModelDescriptor

_LEAVES = ("weight", "bias")


@dataclass(frozen=True)
class Part:
    """The attention or the FFN of one block of the parent.

    Args:
        name: Its full name, `model.layers.3.mlp`.
        tensors: Its tensors by their names in it, `up_proj.weight`.
    """

    name: str
    tensors: Mapping[str, Source]

    def projections(self, leaf: str = "weight") -> dict[str, Source]:
        """Return the weights (or the biases) of its projections, by what they do: `q`, `up`, `linear`.

        Raises:
            FamilyError: Two tensors do the same.
        """
        found: dict[str, Source] = {}
        for name, source in self.tensors.items():
            projection = self._projection(name, leaf)
            if projection in found:
                raise FamilyError(f"{found[projection].key} and {source.key} do the same in one block")
            if projection is not None:
                found[projection] = source
        return found

    def others(self) -> dict[str, Source]:
        """Return what is neither weight nor bias of a projection, by name."""
        return {
            name: source
            for name, source in self.tensors.items()
            if not any(self._projection(name, leaf) for leaf in _LEAVES)
        }

    def _projection(self, name: str, leaf: str) -> str | None:
        module, _, last = name.rpartition(".")
        role = role_of(f"{self.name.rpartition('.')[2]}.{module}.weight") if last == leaf else None
        return role.projection if role is not None and role.part in ("attention", "ffn") else None


def refuse_from_nothing(part: str, name: str, had: object, wanted: object) -> None:
    """Raise if a part shall be made of one that is gone or linear.

    Raises:
        BlockConfigError: It cannot.
    """
    for flag, what in (
        ("no_op", f"has no {name} there"),
        ("replace_with_linear", "has a linear layer there"),
    ):
        if getattr(had, flag):
            raise BlockConfigError(
                f"{wanted!r} is asked for, but the parent {what}; leave {part} out to keep it so, or say "
                "no_op"
            )


def refuse_untold(part: Part, others: Mapping[str, Source], field: str) -> None:
    """Raise if a part has tensors of which nobody knows how they change with a size.

    Raises:
        BlockConfigError: It has.
    """
    if others:
        shown = ", ".join(f"{source.key} {source.shape}" for source in others.values())
        raise BlockConfigError(
            f"{field} cannot be changed: it is not known how {shown} of {part.name} goes with it; keep the "
            "parent's size"
        )


@dataclass(frozen=True)
class Parent:
    """What a parent checkpoint says of itself, checked.

    Args:
        location: The checkpoint, as it is named in errors.
        tensors: All its tensors.
        sizes: What its config says of all blocks alike.
        blocks: What each block is, by the shapes of its tensors.
        stack: Where the blocks are, `model.layers`.
        descriptor: Where its family keeps its parts.
    """

    location: str
    tensors: Mapping[str, Source]
    sizes: BaseSizes
    blocks: tuple[BlockConfig, ...]
    stack: str
    descriptor: ModelDescriptor

    @classmethod
    def of(
        cls,
        location: str,
        tensors: Mapping[str, TensorEntry],
        config: Mapping[str, Any],
        descriptor: ModelDescriptor,
    ) -> Parent:
        """Find out what a checkpoint holds, from its config and the headers of its files.

        Raises:
            FamilyError: The family's tensors are not known to be those of its modules, one for one.
            BlockConfigError: The shapes contradict each other or the config.
            CheckpointError: The config says other blocks than the files hold.
        """
        if descriptor.family not in PLAIN_FAMILIES:
            raise FamilyError(
                f"{location} is of family {descriptor.family!r}, of which no children can be made so far; "
                f"supported are {', '.join(sorted(PLAIN_FAMILIES))}, whose tensors are known to be those of "
                "their modules, one for one"
            )
        stack = _stack_of(tensors, descriptor)
        sizes = BaseSizes.of(config)
        found = infer_block_configs(tensors, config, layers=stack)
        said = read_block_configs(config)
        blocks = [BlockConfig()] * len(found) if said is None else said[0]
        checked = tuple(
            _agreed(index, *pair, sizes, location)
            for index, pair in enumerate(zip(blocks, found, strict=True))
        )
        sources = {key: Source(key, entry) for key, entry in tensors.items()}
        return cls(location, sources, sizes, checked, stack, descriptor)

    def block(self, index: int) -> dict[str, Source]:
        """Return the tensors of a block by their names in it."""
        return self._grouped[0].get(index, {})

    @property
    def ends(self) -> list[Source]:
        """The tensors outside of the blocks."""
        return self._grouped[1]

    @cached_property
    def _grouped(self) -> tuple[dict[int, dict[str, Source]], list[Source]]:
        blocks: dict[int, dict[str, Source]] = {}
        ends = []
        for key, source in self.tensors.items():
            index, _, name = key.removeprefix(f"{self.stack}.").partition(".")
            if key.startswith(f"{self.stack}.") and index.isdecimal():
                blocks.setdefault(int(index), {})[name] = source
            else:
                ends.append(source)
        return blocks, ends


def _stack_of(tensors: Mapping[str, TensorEntry], descriptor: ModelDescriptor) -> str:
    """Return where the blocks are in the files: checkpoints of the backbone alone lack its prefix."""
    short = descriptor.layers.partition(".")[2]
    for stack in (descriptor.layers, short):
        if stack and any(key.startswith(f"{stack}.") for key in tensors):
            return stack
    raise CheckpointError(
        f"no tensor is under {descriptor.layers}, where {descriptor.family} keeps its blocks; there are "
        f"{fold(tensors, limit=4) or 'none at all'}"
    )


def _agreed(
    index: int, said: BlockConfig, found: BlockConfig, sizes: BaseSizes, location: str
) -> BlockConfig:
    """Return a block as the config says it, every size said, if that is what the files hold.

    Raises:
        CheckpointError: They hold something else.
    """
    kv_heads = said.attention.num_key_value_heads or sizes.num_key_value_heads
    width = said.ffn.intermediate_size or sizes.intermediate_size
    resolved = BlockConfig(
        replace(
            said.attention,
            num_key_value_heads=kv_heads or found.attention.num_key_value_heads,
            num_attention_heads=said_query_heads(said.attention, sizes),
        ),
        replace(said.ffn, intermediate_size=width or found.ffn.intermediate_size),
    )
    if resolved != found:
        raise CheckpointError(
            f"{location}: the config says that block {index} is {resolved!r}, the tensors say {found!r}; "
            "correct the config, or fetch the files again"
        )
    return resolved
