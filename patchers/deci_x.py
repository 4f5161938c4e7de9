"""The patcher: within it, a native model class builds heterogeneous layers.

Each decoder layer is given a view of the config with its own sizes, is built by its own class, and then has
its removed parts exchanged for substitutes. What was built is compared with what was asked for: an override
that a family does not honour is an error, never a silent no-op.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations import heterogeneity

from patchers.activation import patched_init, unpatched
from patchers.base_sizes import SIZE_FIELDS
from patchers.block_config import BlockConfig
from patchers.descriptor import ModelDescriptor
from patchers.dialects import Dialect, parse_blocks, read_block_configs
from patchers.dialects.detection import fields_present
from patchers.errors import BlockConfigError, FamilyError
from patchers.families import PLAIN_FAMILIES
from patchers.layer_maker import NO_INDEX, LayerMaker
from patchers.native import layer_count, text_config_of
from patchers.size_fields import LayerFields, overridden
from patchers.size_marks import sides_of
from patchers.size_plan import SizePlan, plan_sizes
from patchers.substitution import refuse_lenders, substitute

BlockConfigs = Sequence[BlockConfig | Mapping[str, Any]] | Mapping[Any, Any]
"""One entry a block, a `BlockConfig` or a dict in any dialect; or the sparse mapping of per_layer_config."""


@contextmanager
def deci_x_patcher(
    model_descriptor: ModelDescriptor | PreTrainedConfig | str,
    block_configs: BlockConfigs | None = None,
) -> Iterator[None]:
    """Build heterogeneous layers out of the native decoder layer class, within this context.

    Building a whole model, a single decoder layer, and transformers' `from_config` and `from_pretrained`
    (Auto classes too) all work inside. Uses may be nested, the innermost counts; threads do not see each
    other's, and a thread that is started inside sees this one.

    Args:
        model_descriptor: Which classes to patch: a `ModelDescriptor`, a config, or the name of a family.
        block_configs: One entry a layer: `BlockConfig`s, or dicts in any dialect. None takes what the config
            of the model that is being built says (`block_configs`, `per_layer_config`); a config that says
            nothing is then built as ever.

    Raises:
        BlockConfigError: While building: the entries are wrong, or not as many as the layers.
        FamilyError: While building: the family does not support what is asked for.
        PatchError: While building: the layer does not have the sizes that its block config says.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from patchers import AttentionConfig, BlockConfig, FFNConfig
        >>> config = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        >>> blocks = [BlockConfig(AttentionConfig(no_op=True), FFNConfig()), BlockConfig(ffn=FFNConfig(16))]
        >>> with deci_x_patcher("llama", blocks), torch.device("meta"):
        ...     model = LlamaForCausalLM(config)
        >>> model.model.layers[1].mlp.up_proj.weight.shape
        torch.Size([16, 32])
    """
    descriptor = ModelDescriptor.of(model_descriptor)
    _ = descriptor.layer_kinds  # tried out here, before anything is built
    patcher = _Patcher(descriptor, block_configs)
    with patched_init(descriptor.layer_classes, patcher.build):
        yield


@contextmanager
def as_described(
    descriptor: ModelDescriptor, config: PreTrainedConfig, block_configs: BlockConfigs | None = None
) -> Iterator[None]:
    """Build the blocks that a config describes, and no others: a plain config is built as ever.

    Whatever `deci_x_patcher` is open around it does not count inside.
    """
    blocks = blocks_of(config, block_configs)
    with unpatched() if blocks is None else deci_x_patcher(descriptor, blocks):
        yield


def blocks_of(config: PreTrainedConfig, asked: BlockConfigs | None = None) -> list[BlockConfig] | None:
    """Return one block config a layer: those asked for, else those that the config says, else None.

    Raises:
        BlockConfigError: They are wrong, or not as many as the layers.
    """
    return _parsed(_text_fields(config), asked)


def _text_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that say the decoder layers, with the block configs that an outer config says of them."""
    text = text_config_of(config)
    fields = text.to_dict()
    # the number of layers may be a property, that of an encoder, or written otherwise than it is used (dory)
    names = [name for name in SIZE_FIELDS["num_hidden_layers"] if name in fields] or ["num_hidden_layers"]
    fields |= dict.fromkeys(names, layer_count(config))
    if text is config or config.is_encoder_decoder:
        return fields
    outer = config.to_dict()
    for name in fields_present(outer):
        if fields.get(name) not in (None, outer[name]):
            raise BlockConfigError(f"{name} and text_config.{name} disagree; remove the one that is wrong")
        fields[name] = outer[name]
    return fields


def _transformers_builds_them() -> bool:
    """Whether this transformers has the modelling half of per_layer_config too, not the config half alone."""
    return hasattr(heterogeneity, "apply_heterogeneous_modeling")


def _parsed(base: Mapping[str, Any], asked: BlockConfigs | None) -> list[BlockConfig] | None:
    if asked is not None:
        return parse_blocks(asked, base)
    found = read_block_configs(base)
    if found is None or (found[1] is Dialect.PER_LAYER and _transformers_builds_them()):
        return None
    return found[0]


class _Patcher:
    """Builds the layers of one `deci_x_patcher` block."""

    def __init__(self, descriptor: ModelDescriptor, asked: BlockConfigs | None) -> None:
        self.descriptor, self.asked = descriptor, asked
        self._known: tuple[PreTrainedConfig, Any, list[BlockConfig] | None] | None = None
        self._building: set[int] = set()
        self._fields: dict[Any, LayerFields] = {}

    def build(self, layer: nn.Module, true_init: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Build one decoder layer in place of its `__init__`."""
        make = LayerMaker(layer, true_init, args, kwargs)
        if make.config is None and not self._is_changed(self._known[2] if self._known else None):
            true_init(layer, *args, **kwargs)  # nobody says anything of this layer
            return
        if make.config is None:
            raise FamilyError(
                f"{type(layer).__name__} is not built from a config, so its blocks cannot be changed"
            )
        blocks = self._read(make.config, make.index)
        is_told = make.index is not NO_INDEX or self._is_changed(blocks)
        # a layer class that calls another patched one is built once
        if blocks is None or not is_told or id(layer) in self._building:
            true_init(layer, *args, **kwargs)
            return
        _check_index(make.index, layer, len(blocks))
        self._build(make, blocks[make.index])

    def _is_changed(self, blocks: list[BlockConfig] | None) -> bool:
        """Whether some block is to be other than the config says, as far as is known."""
        return self.asked is not None if blocks is None else set(blocks) != {BlockConfig()}

    def _build(self, make: LayerMaker, block: BlockConfig) -> None:
        plan = self._plan_sizes(block, make)
        self._building.add(id(make.layer))
        try:
            make.into(make.layer, overridden(make.seen, plan.values, make.index))
        except ValueError as error:
            if not plan.values:
                raise
            asked = ", ".join(f"{size}={value}" for size, (value, _) in plan.shown.items())
            raise FamilyError(
                f"block {make.index} asks for {asked}, which {type(make.layer).__name__} refuses: {error}"
            ) from error
        finally:
            self._building.discard(id(make.layer))
        plan.check(make.layer, make.index)
        if plan.has_other_kv_heads:
            parts = self.descriptor.kind_of(make.layer).attention
            refuse_lenders(make.layer, parts, self.descriptor.family, make.index, "other KV heads")
        if not (block.attention.is_native and block.ffn.is_native):
            substitute(make.layer, self.descriptor, block, make.seen.hidden_size, make.index)

    def _read(self, config: PreTrainedConfig, index: Any) -> list[BlockConfig] | None:
        """Return the blocks of a config; read once a model, not once a layer."""
        known = self._known
        is_next = known is not None and known[0] is config and isinstance(index, int) and index > known[1]
        if known is None or not is_next:  # another model begins, and the config may have been changed
            known = (config, index, _parsed(_text_fields(config), self.asked))
            self._fields = {}
        self._known = (config, index, known[2])
        return known[2]

    def _plan_sizes(self, block: BlockConfig, make: LayerMaker) -> SizePlan:
        if not _says_sizes(block):
            return SizePlan()
        key: Any = type(make.layer)
        if self.descriptor.family not in PLAIN_FAMILIES or make.native:  # layers of one class may differ
            key = (key, tuple(sides_of(make.on_meta({})).items()))
        if key not in self._fields:
            kind = self.descriptor.kind_of(make.on_meta({}))
            self._fields[key] = LayerFields(make.seen, make.index, kind, make.on_meta)
        return plan_sizes(block, self._fields[key], self.descriptor.family, make.index)


def _says_sizes(block: BlockConfig) -> bool:
    heads = (block.attention.num_attention_heads, block.attention.num_key_value_heads)
    sizes = (*heads, block.ffn.intermediate_size, block.ffn.moe)
    return any(size is not None for size in sizes)


def _check_index(index: Any, layer: nn.Module, count: int) -> None:
    if index is NO_INDEX:
        raise FamilyError(
            f"{type(layer).__name__} is not told its layer index, so its blocks cannot be changed"
        )
    if not isinstance(index, int) or not 0 <= index < count:
        raise BlockConfigError(
            f"{type(layer).__name__} was built with layer index {index!r}; there are {count} block configs"
        )


__all__ = ["BlockConfigs", "as_described", "blocks_of", "deci_x_patcher"]
