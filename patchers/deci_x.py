"""The patcher: within it, a native model class builds heterogeneous layers.

Each decoder layer is given a view of the config with its own sizes, is built by its own class, and then has
its removed parts exchanged for substitutes. What was built is compared with what was asked for: an override
that a family does not honour is an error, never a silent no-op.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations import heterogeneity

from patchers.activation import patched_init, unpatched
from patchers.base_sizes import FieldNames
from patchers.block_config import BlockConfig
from patchers.descriptor import ModelDescriptor, SubBlock, text_config_of
from patchers.dialects import Dialect, parse_blocks, read_block_configs
from patchers.dialects.detection import fields_present
from patchers.errors import BlockConfigError, FamilyError, PatchError
from patchers.layer_config import base_config, layer_config
from patchers.measure import built_block
from patchers.substitutes import LinearAttention, LinearFFN, NoAttention, NoFFN, NoNorm

_INDEX_ARGUMENTS = ("layer_idx", "layer_id", "idx", "layer_number", "layer_index", "i")
_NO_INDEX = object()
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
    _ = descriptor.attention  # tried out here: the caller may build on meta, where nothing can be tried
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
        self._known: tuple[PreTrainedConfig, Any, dict[str, Any], list[BlockConfig] | None] | None = None
        self._building: set[int] = set()

    def build(self, layer: nn.Module, true_init: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Build one decoder layer in place of its `__init__`."""
        call = inspect.signature(true_init).bind(layer, *args, **kwargs)
        call.apply_defaults()
        config_name, config = _config_argument(call)
        if config is None and self.asked is None:  # nobody can say anything of this layer
            true_init(layer, *args, **kwargs)
            return
        if config is None:
            raise FamilyError(
                f"{type(layer).__name__} is not built from a config, so its blocks cannot be changed"
            )
        index = _layer_index(call)
        base, blocks = self._read(config, index)
        # a layer class that calls another patched one is built once
        if blocks is None or id(layer) in self._building:
            true_init(layer, *args, **kwargs)
            return
        _check_index(index, layer, len(blocks))
        self._refuse_unsupported(blocks[index], index)
        call.arguments[config_name] = layer_config(config, _overrides(config, base, blocks[index], index))
        self._building.add(id(layer))
        try:
            true_init(*call.args, **call.kwargs)
        finally:
            self._building.discard(id(layer))
        _verify(layer, blocks[index], base, index)
        _substitute(layer, self.descriptor, blocks[index], config.hidden_size, index)

    def _read(self, config: PreTrainedConfig, index: Any) -> tuple[dict[str, Any], list[BlockConfig] | None]:
        """Return the config as a mapping and its blocks; read once a model, not once a layer."""
        known = self._known
        is_next = known is not None and known[0] is config and isinstance(index, int) and index > known[1]
        if known is None or not is_next:  # another model begins, and the config may have been changed
            base = config.to_dict()
            known = (config, index, base, _parsed(base, self.asked))
        self._known = (config, index, known[2], known[3])
        return known[2], known[3]

    def _refuse_unsupported(self, block: BlockConfig, index: int) -> None:
        family = self.descriptor.family
        if block.ffn.moe is not None:
            raise FamilyError(
                f"block {index} asks for experts (moe), which are not built for {family} so far"
            )
        for kind, part, wanted in (
            ("attention", self.descriptor.attention, block.attention),
            ("FFN", self.descriptor.ffn, block.ffn),
        ):
            changed = wanted.no_op or wanted.replace_with_linear
            if part is None and (changed or _size_of(wanted) is not None):
                raise FamilyError(
                    f"block {index} changes its {kind}, but layers of {family} have no single {kind}"
                )
            if part is not None and changed and not part.removable:
                raise FamilyError(
                    f"block {index} removes its {kind}, but in {family} a layer without it is not the "
                    "identity: zeros in its place would be silently wrong"
                )


def _size_of(wanted: Any) -> int | None:
    return getattr(wanted, "num_key_value_heads", None) or getattr(wanted, "intermediate_size", None)


def _config_argument(call: inspect.BoundArguments) -> tuple[str, PreTrainedConfig | None]:
    for name, value in call.arguments.items():
        if isinstance(value, PreTrainedConfig):
            return name, base_config(value)
    return "", None


def _layer_index(call: inspect.BoundArguments) -> Any:
    return next((call.arguments[name] for name in _INDEX_ARGUMENTS if name in call.arguments), _NO_INDEX)


def _check_index(index: Any, layer: nn.Module, count: int) -> None:
    if index is _NO_INDEX:
        raise FamilyError(
            f"{type(layer).__name__} is not told its layer index, so its blocks cannot be changed"
        )
    if not isinstance(index, int) or not 0 <= index < count:
        raise BlockConfigError(
            f"{type(layer).__name__} was built with layer index {index!r}; there are {count} block configs"
        )


def _overrides(
    config: PreTrainedConfig, base: Mapping[str, Any], block: BlockConfig, index: int
) -> dict[str, Any]:
    """Return the attributes that this layer sees otherwise than the model."""
    native = vars(config).get("_heterogeneity_spec")
    said = config.per_layer_config[index] if native else None
    overrides = {name: getattr(said, name) for name in native.per_layer_attributes} if native else {}
    names = FieldNames.of(base)
    sizes = {
        names.num_key_value_heads: block.attention.num_key_value_heads,
        names.intermediate_size: block.ffn.intermediate_size,
    }
    return {**overrides, **{name: size for name, size in sizes.items() if size is not None}}


def _substitute(
    layer: nn.Module, descriptor: ModelDescriptor, block: BlockConfig, hidden_size: int, index: int
) -> None:
    attention, ffn = descriptor.attention, descriptor.ffn
    if attention and block.attention.no_op:
        _exchange(layer, attention, NoAttention(index, attention.arity), drop_norms=True)
    elif attention and block.attention.replace_with_linear:
        _exchange(layer, attention, LinearAttention(hidden_size, index, attention.arity))
    if ffn and block.ffn.no_op:
        _exchange(layer, ffn, NoFFN(ffn.arity), drop_norms=True)
    elif ffn and block.ffn.replace_with_linear:
        _exchange(layer, ffn, LinearFFN(hidden_size, ffn.arity))


def _exchange(layer: nn.Module, part: SubBlock, substitute: nn.Module, drop_norms: bool = False) -> None:
    setattr(layer, part.name, substitute)
    for norm in part.norms if drop_norms else ():
        setattr(layer, norm, NoNorm())


def _verify(layer: nn.Module, wanted: BlockConfig, base: Mapping[str, Any], index: int) -> None:
    """Compare the shapes that were built with the sizes that were asked for."""
    found = built_block(layer, base)
    for field, asked, made in (
        ("num_key_value_heads", wanted.attention.num_key_value_heads, found.attention.num_key_value_heads),
        ("intermediate_size", wanted.ffn.intermediate_size, found.ffn.intermediate_size),
    ):
        if asked is not None and made != asked:
            raise PatchError(
                f"block {index} asks for {field}={asked}, but {type(layer).__name__} built {made}: its "
                f"family does not honour {field} layer by layer"
            )


__all__ = ["BlockConfigs", "as_described", "blocks_of", "deci_x_patcher"]
