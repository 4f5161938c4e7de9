"""Where a family of models keeps its parts, found out from the native class by rule, on the meta device.

Nothing here is a table of families. The names come from the objects that transformers itself hands out (the
embeddings, the decoder); what a module returns comes from one traced forward on meta; what may be removed
comes from trying it: a removed part is right only where a layer without its parts is the identity.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from patchers.activation import unpatched
from patchers.errors import ConfigError, FamilyError
from patchers.families import NATIVE_FAMILY, PLAIN_FAMILIES
from patchers.meta import build_on_meta
from patchers.probe import LayerKind, SubBlock, is_structured_as, probe_layers, structure_of
from patchers.versions import warn_if_untested


@dataclass(frozen=True)
class ModelDescriptor:
    """Where the models of one family keep their parts.

    Attributes:
        family: The config's `model_type`.
        model_class: The native class, such as `LlamaForCausalLM`.
        layers: Dotted name of the list of decoder layers.
        embedding: Dotted name of the input embedding.
        final_norm: Dotted name of the norm after the last layer, or None.
        head: Dotted name of the output projection, or None.
        layer_classes: The classes of the layers.
        probe: Finds out how the layers work. Called once, when somebody asks: running layers takes longer
            than a warm load.

    Example:
        >>> from transformers import LlamaConfig
        >>> descriptor = ModelDescriptor.from_config(LlamaConfig())
        >>> descriptor.layers, descriptor.attention.name, descriptor.ffn.norms
        ('model.layers', 'self_attn', ('post_attention_layernorm',))
    """

    family: str
    model_class: type[PreTrainedModel]
    layers: str
    embedding: str
    final_norm: str | None
    head: str | None
    layer_classes: tuple[type[nn.Module], ...]
    probe: Callable[[], tuple[LayerKind, ...]] = field(repr=False, compare=False)

    @functools.cached_property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers that a model has, and how each works.

        Raises:
            FamilyError: The layers cannot be run on the meta device.
        """
        return self.probe()

    @property
    def layer_arity(self) -> int:
        """What a layer returns: 0 for a bare tensor, else the length of the tuple."""
        arities = {kind.arity for kind in self.layer_kinds}
        if len(arities) != 1:
            raise FamilyError(f"layers of {self.family} return in several forms: {sorted(arities)}")
        return arities.pop()

    @property
    def attention(self) -> SubBlock | None:
        """The attention of a layer; None if the layers do not all have the same single one."""
        return _the_one(kind.attention for kind in self.layer_kinds)

    @property
    def ffn(self) -> SubBlock | None:
        """The FFN of a layer; None if the layers do not all have the same single one."""
        return _the_one(kind.ffn for kind in self.layer_kinds)

    def kind_of(self, layer: nn.Module) -> LayerKind:
        """Return the kind of a layer as its own class has built it.

        Raises:
            FamilyError: The model that this descriptor was derived from had no such layer.
        """
        structure = structure_of(layer)
        for kind in self.layer_kinds:
            if is_structured_as(structure, kind.structure):
                return kind
        parts = ", ".join(f"{name} ({cls.__name__})" for name, cls in structure[1])
        raise FamilyError(
            f"{type(layer).__name__} has the parts {parts}, which no layer had when the descriptor of "
            f"{self.family} was derived; derive it from this model's own config: "
            "ModelDescriptor.from_config(config)"
        )

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None
    ) -> ModelDescriptor:
        """Derive the descriptor of the native model that a config builds.

        Args:
            config: Of the model.
            model_class: The class to describe, where transformers' Auto classes do not know it.

        Raises:
            FamilyError: The config is not that of a causal language model whose layers can be found.
        """
        warn_if_untested()
        if model_class is not None:
            return _derive(config, model_class)
        if config.model_type in _OWN:
            return _OWN[config.model_type](config)
        if config.model_type in PLAIN_FAMILIES:
            return _derive_plain(config.model_type)
        return _derive(config, model_class_of(config))

    @classmethod
    def of(
        cls, what: ModelDescriptor | PreTrainedConfig | str, config: PreTrainedConfig | None = None
    ) -> ModelDescriptor:
        """Return the descriptor that a user's `descriptor` argument stands for.

        Args:
            what: A descriptor, a config, the name of a family (`"llama"`, `"nemotron-nas"`), or `"auto"`.
            config: The model's config, if there is one; `"auto"` needs it.

        Raises:
            ConfigError: `"auto"` without a config, an unknown name, or a descriptor of another family than
                the config's.
        """
        if isinstance(what, PreTrainedConfig):
            return cls.from_config(what)
        if what == "auto" and config is None:
            raise ConfigError(
                'descriptor "auto" needs a config to look at; pass the name of a family, such as "llama", or '
                "ModelDescriptor.from_config(config)"
            )
        if isinstance(what, str):
            what = cls.from_config(config) if what == "auto" and config is not None else cls.from_family(what)
        if not isinstance(what, ModelDescriptor):
            raise ConfigError(
                f"a descriptor is a ModelDescriptor, the name of a family or 'auto', not {what!r}"
            )
        if config is not None and config.model_type != what.family:
            raise ConfigError(
                f"the descriptor is of family {what.family!r}, the config of family {config.model_type!r}"
            )
        return what

    @classmethod
    def from_family(cls, family: str) -> ModelDescriptor:
        """Derive the descriptor of a family from its default config.

        Raises:
            ConfigError: transformers knows no such family.
        """
        try:
            config = AutoConfig.for_model(NATIVE_FAMILY.get(family, family))
        except ValueError as error:
            raise ConfigError(
                f"transformers knows no model family {family!r}; a family is named as model_type in "
                "config.json, "
                'such as "llama" or "qwen3"'
            ) from error
        return cls.from_config(config)

    def block_name(self, index: int) -> str:
        """Return the dotted name of a block."""
        return f"{self.layers}.{index}"


_OWN: dict[str, Callable[[PreTrainedConfig], ModelDescriptor]] = {}


def register_descriptor(family: str, derive: Callable[[PreTrainedConfig], ModelDescriptor]) -> None:
    """Let `"auto"`, and every place that takes a config, find a descriptor of one's own.

    Args:
        family: The config's `model_type`.
        derive: Makes the descriptor of a config of that family. `ModelDescriptor.from_config(config,
            MyModel)` derives it from a class by rule; `dataclasses.replace` then says what the rule gets
            wrong.
    """
    _OWN[family] = derive


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of a config that says the decoder layers: all of it, or the text config in it."""
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    return text


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the native generating class of a config, as transformers' Auto classes choose it.

    It is the class that `architectures` names; else that of causal language models, or, where the language
    model is nested in a larger one, that which takes images and text.

    Raises:
        FamilyError: There is none.
    """
    plain: tuple[Any, ...] = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    nested = text_config_of(config) is not config and not config.is_encoder_decoder
    found = [cls for mapping in (plain[::-1] if nested else plain) for cls in _classes_of(mapping, config)]
    named = [cls for cls in found if cls.__name__ in (config.architectures or ())]
    remote = _remote_class(config)
    if not (remote or found):
        raise FamilyError(
            f"transformers has no causal language model for {type(config).__name__} (model_type "
            f"{config.model_type!r})"
        )
    native: type[PreTrainedModel] = remote or [*named, *found][0]
    return native


def _classes_of(mapping: Any, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    found = mapping.get(type(config), None) or ()
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def _remote_class(config: PreTrainedConfig) -> Any:
    """Return the model class of a config whose own class is remote code, to which the user has consented."""
    name = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if name is None or not type(config).__module__.startswith("transformers_modules"):
        return None
    return get_class_from_dynamic_module(name, config.name_or_path or "")


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the dotted name and the list of a model's decoder layers.

    It is the ModuleList under the decoder with as many members as the config has layers, all of them of a
    class that transformers treats as a decoder layer.

    Raises:
        FamilyError: There is no such list, or more than one.
    """
    count = text_config_of(model.config).num_hidden_layers
    decoder, prefix = model.get_decoder(), ""
    if decoder is not model:
        prefix = _name_in(model, decoder) + "."
    found = [
        (prefix + name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(_is_layer(model, m) for m in module)
    ]
    if len(found) != 1:
        raise FamilyError(
            f"{type(model).__name__} has {len(found)} lists of {count} decoder layers "
            f"({', '.join(name for name, _ in found) or 'none'}), not one; pass a ModelDescriptor of your own"
        )
    return found[0]


def _is_layer(model: PreTrainedModel, module: nn.Module) -> bool:
    unsplit = type(module).__name__ in (model._no_split_modules or ())
    return unsplit or isinstance(module, GradientCheckpointingLayer)


def _name_in(model: nn.Module, wanted: nn.Module | None) -> str:
    return next(name for name, module in model.named_modules(remove_duplicate=False) if module is wanted)


@functools.cache
def _derive_plain(family: str) -> ModelDescriptor:
    # one layer speaks for all, and sizes change nothing: this keeps large models cheap to describe
    config = AutoConfig.for_model(family, num_hidden_layers=1)
    return _derive(config, model_class_of(config))


def _derive(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> ModelDescriptor:
    """Find the names; how the layers work is found out when somebody asks for it."""
    model = _model_on_meta(model_class, config)
    layers, members = find_layers(model)
    head = model.get_output_embeddings()
    return ModelDescriptor(
        family=config.model_type,
        model_class=model_class,
        layers=layers,
        embedding=_name_in(model, model.get_input_embeddings()),
        final_norm=_final_norm(model, layers),
        head=None if head is None else _name_in(model, head),
        layer_classes=tuple(dict.fromkeys(type(member) for member in members)),
        probe=functools.partial(_probe, model_class, copy.deepcopy(config)),
    )


def _probe(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    with unpatched(), torch.device("cpu"):  # it may be in the middle of a build on meta that somebody asks
        model = _model_on_meta(model_class, config)
        return tuple(probe_layers(model, find_layers(model)[1]))


def _model_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with unpatched():
        # grouped experts are bf16-only on meta
        return build_on_meta(model_class, config, torch.bfloat16)


def _final_norm(model: nn.Module, layers: str) -> str | None:
    backbone_name, _, list_name = layers.rpartition(".")
    backbone = model.get_submodule(backbone_name)
    names = list(dict(backbone.named_children()))
    after = names[names.index(list_name) + 1 :]
    norms = [name for name in after if "norm" in type(getattr(backbone, name)).__name__.lower()]
    return f"{backbone_name}.{norms[0]}".lstrip(".") if norms else None


def _the_one(found: Iterable[tuple[SubBlock, ...]]) -> SubBlock | None:
    different = set(found)
    parts = next(iter(different)) if len(different) == 1 else ()
    return parts[0] if len(parts) == 1 else None
