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

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from patchers.activation import unpatched
from patchers.errors import ConfigError, FamilyError
from patchers.families import NATIVE_FAMILY, PLAIN_FAMILIES
from patchers.native import final_norm_of, find_layers, model_class_of, model_on_meta, name_in
from patchers.probe import LayerKind, SubBlock, is_structured_as, probe_layers, structure_of
from patchers.tables import Table, as_html, as_text
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

    def __str__(self) -> str:
        return as_text([self.table])

    def _repr_html_(self) -> str:
        return as_html([self.table])

    @property
    def table(self) -> Table:
        """What it looks like. How layers work is in it once it was found out, which takes a while."""
        parts = {"layers": self.layers, "embedding": self.embedding}
        parts |= {"final norm": self.final_norm or "-", "head": self.head or "-"}
        parts["layer classes"] = ", ".join(cls.__name__ for cls in self.layer_classes)
        kinds = self.layer_kinds if "layer_kinds" in vars(self) else ()
        for name in ("attention", "ffn"):
            found = dict.fromkeys(part.name for kind in kinds for part in getattr(kind, name))
            parts |= {name: ", ".join(found)} if found else {}
        return Table(
            [["part", "where"], *map(list, parts.items())], f"{self.family}: {self.model_class.__name__}"
        )

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
    def from_skeleton(cls, model: PreTrainedModel) -> ModelDescriptor:
        """Describe a model of a plain family by itself: no other one is built to look at.

        Args:
            model: As its own class builds it, whole and on meta.

        Raises:
            FamilyError: The family is not plain: layers of one model may be other than those of the next.
        """
        family = model.config.model_type
        if family not in PLAIN_FAMILIES:
            raise FamilyError(f"layers of {family} may differ from model to model; use from_config(config)")
        warn_if_untested()
        if family not in _PLAIN:
            _PLAIN[family] = _describe(model, functools.partial(_plain_model, family))
        return _PLAIN[family]

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


def plain_class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the native class of a config; None if its family is not plain, or described by hand."""
    family = config.model_type
    is_plain = family in PLAIN_FAMILIES and family not in _OWN and type(config) is CONFIG_MAPPING[family]
    return model_class_of(config) if is_plain else None


_PLAIN: dict[str, ModelDescriptor] = {}
"""The descriptors of plain families; sizes change nothing about them."""


def _derive_plain(family: str) -> ModelDescriptor:
    return _PLAIN.get(family) or ModelDescriptor.from_skeleton(_plain_model(family))


def _plain_model(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, num_hidden_layers=1)  # one layer speaks for all
    return model_on_meta(model_class_of(config), config)


def _derive(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> ModelDescriptor:
    model = model_on_meta(model_class, config)
    return _describe(model, functools.partial(model_on_meta, model_class, copy.deepcopy(config)))


def _describe(model: PreTrainedModel, build: Callable[[], PreTrainedModel]) -> ModelDescriptor:
    """Find the names; how the layers work is found out when somebody asks for it."""
    layers, members = find_layers(model)
    head = model.get_output_embeddings()
    return ModelDescriptor(
        family=model.config.model_type,
        model_class=type(model),
        layers=layers,
        embedding=name_in(model, model.get_input_embeddings()),
        final_norm=final_norm_of(model, layers),
        head=None if head is None else name_in(model, head),
        layer_classes=tuple(dict.fromkeys(type(member) for member in members)),
        probe=functools.partial(_probe, build),
    )


def _probe(build: Callable[[], PreTrainedModel]) -> tuple[LayerKind, ...]:
    with unpatched(), torch.device("cpu"):  # it may be in the middle of a build on meta that somebody asks
        model = build()
        return tuple(probe_layers(model, find_layers(model)[1]))


def _the_one(found: Iterable[tuple[SubBlock, ...]]) -> SubBlock | None:
    different = set(found)
    parts = next(iter(different)) if len(different) == 1 else ()
    return parts[0] if len(parts) == 1 else None
