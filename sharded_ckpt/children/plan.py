"""What a child's checkpoint will hold, and what each tensor of it is made of: pure data, nothing is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from patchers.base_sizes import BaseSizes, said_query_heads
from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig
from patchers.block_fields import at_block
from patchers.dialects import parse_blocks
from patchers.errors import BlockConfigError, PatchError
from patchers.inference import infer_block_configs
from patchers.names import fold, fold_indices
from sharded_ckpt.children.attention import KV_HEADS, LINEAR_ATTENTION, QUERY_HEADS, plan_attention
from sharded_ckpt.children.choices import Rules, check_choices, check_name
from sharded_ckpt.children.ffn import FFN_CHANNELS, LINEAR_FFN, plan_ffn
from sharded_ckpt.children.parent import Parent, Part
from sharded_ckpt.children.recipes import Recipe, Source, copy_of
from sharded_ckpt.ownership.partition import min_max_partition

if TYPE_CHECKING:
    from patchers.probe import SubBlock

SUB_BLOCKS: dict[str, Callable[..., list[Recipe]]] = {"attention": plan_attention, "ffn": plan_ffn}
"""What plans each half of a block."""

FLOATS = ("F64", "F32", "BF16", "F16")
"""The dtypes that are computed with and cast; others (quantized ones of one byte, integers) only copied."""

# what a linear layer without bias cannot say of the part that it replaces
_LOST_BIASES = {"attention": ("v", "o"), "ffn": ("up", "down")}


@dataclass(frozen=True)
class ChildPlan:
    """A child's checkpoint before a byte of it is written.

    Args:
        blocks: What each block is, every size said.
        units: The recipes in file order: the embedding, each block, the rest. A unit is made by one rank.
        lost: Keys of biases that have no place in the linear layer that replaces their part.
    """

    blocks: tuple[BlockConfig, ...]
    units: tuple[tuple[Recipe, ...], ...]
    lost: tuple[str, ...] = ()

    @property
    def recipes(self) -> list[Recipe]:
        """The recipes of all tensors."""
        return [recipe for unit in self.units for recipe in unit]

    @property
    def nbytes(self) -> int:
        """How many bytes all tensors take."""
        return sum(recipe.nbytes for recipe in self.recipes)

    def share(self, rank: int, world_size: int) -> list[Recipe]:
        """Return what one rank makes: a run of units, so that the largest share is as small as can be."""
        runs = min_max_partition([sum(recipe.nbytes for recipe in unit) for unit in self.units], world_size)
        return [recipe for unit in runs[rank] for recipe in self.units[unit]] if rank < len(runs) else []


def plan_child(
    parent: Parent,
    block_configs: Sequence[BlockConfig | Mapping[str, Any]] | Mapping[Any, Any],
    rules: Rules | None = None,
    *,
    dtype: str | None = None,
) -> ChildPlan:
    """Plan a child.

    Args:
        parent: What it is made of.
        block_configs: What it shall be, as `init_child_from_parent` takes it.
        rules: How it is made.
        dtype: What ordinary floating-point tensors become, as safetensors calls it; None keeps theirs.

    Raises:
        ConfigError: A rule is not known.
        BlockConfigError: A block cannot be made of the parent's; block, field and both sizes are named.
    """
    rules = rules or Rules()
    _check_rules(rules, len(parent.blocks))
    asked = parse_blocks(_one_each(block_configs, len(parent.blocks)), parent.sizes.raw)
    blocks = tuple(_settled(*pair, parent.sizes) for pair in zip(asked, parent.blocks, strict=True))
    planned = []
    for index, block in enumerate(blocks):
        with at_block(index):
            planned.append(_plan_block(parent, index, block, rules))
            _refuse_quantized(parent, planned[-1])
    units = [_cast(unit, dtype) for unit in _units(parent, planned)]
    _verify(parent, blocks, units)
    lost = [key for index, block in enumerate(blocks) for key in _lost_biases(parent, index, block)]
    return ChildPlan(blocks, tuple(units), tuple(lost))


def _check_rules(rules: Rules, count: int) -> None:
    check_choices(rules.ffn_channels, count, "ffn_channels", FFN_CHANNELS)
    check_choices(rules.kv_heads, count, "kv_heads", KV_HEADS)
    if rules.query_heads is not None:
        check_choices(rules.query_heads, count, "query_heads", QUERY_HEADS)
    check_name(rules.linear, "linear", [name for name in LINEAR_ATTENTION if name in LINEAR_FFN])


def _one_each(block_configs: Any, count: int) -> Sequence[BlockConfig | Mapping[str, Any]]:
    """Return one entry for each block: those that a mapping does not name say nothing."""
    if isinstance(block_configs, str) or not isinstance(block_configs, Iterable):
        raise BlockConfigError(
            f"block_configs={block_configs!r:.80}: give one entry for each block, or a mapping with those "
            "that change"
        )
    if not isinstance(block_configs, Mapping):
        return list(block_configs)
    entries: dict[int, BlockConfig | Mapping[str, Any]] = {}
    for key, entry in block_configs.items():
        index = int(key) if isinstance(key, str) and key.isdecimal() else key
        if index not in range(count):
            raise BlockConfigError(
                f"block_configs has the key {key!r}; the blocks are {fold_indices(range(count))}"
            )
        if index in entries:
            raise BlockConfigError(f"block_configs has block {index} twice (key {key!r})")
        entries[index] = entry
    return [entries.get(index, BlockConfig()) for index in range(count)]


def _settled(asked: BlockConfig, had: BlockConfig, sizes: BaseSizes) -> BlockConfig:
    """Return what a block shall be: a part of which nothing is said, and heads, stay the parent's."""
    attention = had.attention if asked.attention == AttentionConfig() else asked.attention
    if attention.is_native:
        heads = attention.num_attention_heads or had.attention.num_attention_heads
        kv_heads = attention.num_key_value_heads or had.attention.num_key_value_heads
        attention = replace(attention, num_key_value_heads=kv_heads, num_attention_heads=heads)
        attention = replace(attention, num_attention_heads=said_query_heads(attention, sizes))
    ffn = had.ffn if asked.ffn == FFNConfig() else asked.ffn
    return BlockConfig(
        replace(attention, extra=asked.attention.extra or had.attention.extra),
        replace(ffn, extra=asked.ffn.extra or had.ffn.extra),
    )


def _plan_block(parent: Parent, index: int, block: BlockConfig, rules: Rules) -> list[Recipe]:
    left = dict(parent.block(index))
    recipes = []
    for kind, plan in SUB_BLOCKS.items():
        had, wanted = getattr(parent.blocks[index], kind), getattr(block, kind)
        part, norms = _take_out(parent, index, kind, left)
        recipes += plan(part, had, wanted, rules, index, parent.sizes)
        recipes += [] if wanted.no_op else [copy_of(norm) for norm in norms]
    return recipes + [copy_of(source) for source in left.values()]


def _take_out(parent: Parent, index: int, kind: str, left: dict[str, Source]) -> tuple[Part, list[Source]]:
    """Take the tensors of one part, and those of the norms that go with it, out of a block's."""
    sub_block: SubBlock = getattr(parent.descriptor, kind)
    inside = {name: left.pop(name) for name in list(left) if name.startswith(f"{sub_block.name}.")}
    tensors = {name.removeprefix(f"{sub_block.name}."): source for name, source in inside.items()}
    norms = [left.pop(name) for name in list(left) if name.partition(".")[0] in sub_block.norms]
    return Part(f"{parent.stack}.{index}.{sub_block.name}", tensors), norms


def _units(parent: Parent, blocks: Sequence[list[Recipe]]) -> list[list[Recipe]]:
    embedding = parent.descriptor.embedding.removeprefix(parent.descriptor.layers.removesuffix(parent.stack))
    first = [source for source in parent.ends if source.key.startswith(f"{embedding}.")]
    rest = [source for source in parent.ends if source not in first]
    return [[copy_of(source) for source in first], *blocks, [copy_of(source) for source in rest]]


def _cast(unit: Sequence[Recipe], dtype: str | None) -> tuple[Recipe, ...]:
    if dtype is None:
        return tuple(unit)
    return tuple(replace(recipe, dtype=dtype) if recipe.dtype in FLOATS else recipe for recipe in unit)


def _verify(parent: Parent, blocks: Sequence[BlockConfig], units: Sequence[Sequence[Recipe]]) -> None:
    """Read the planned shapes back as block configs: a child whose config says otherwise is not written."""
    shapes = {recipe.key: recipe.shape for unit in units[1:-1] for recipe in unit}
    found = infer_block_configs(shapes, parent.sizes.raw, layers=parent.stack)
    for index, (planned, wanted) in enumerate(zip(found, blocks, strict=True)):
        if planned != wanted:
            raise PatchError(f"block {index} of the child would be {planned!r}, but {wanted!r} was asked for")


def _refuse_quantized(parent: Parent, recipes: Sequence[Recipe]) -> None:
    keys = {key for recipe in recipes for key in recipe.computed}
    if wrong := sorted(key for key in keys if parent.tensors[key].dtype not in FLOATS):
        raise BlockConfigError(
            f"{fold(wrong)} would be computed with, but is {parent.tensors[wrong[0]].dtype}; expected one of "
            f"{', '.join(FLOATS)}: choose by 'first', Indexes or Scores, or dequantize the parent"
        )


def _lost_biases(parent: Parent, index: int, block: BlockConfig) -> list[str]:
    lost = []
    for kind, names in _LOST_BIASES.items():
        had, wanted = getattr(parent.blocks[index], kind), getattr(block, kind)
        if wanted.replace_with_linear and had.is_native:
            part, _ = _take_out(parent, index, kind, dict(parent.block(index)))
            lost += [source.key for name, source in part.projections("bias").items() if name in names]
    return lost
