"""The native class of a config, and where a model of it keeps its layers and what is around them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from patchers.activation import unpatched
from patchers.errors import FamilyError
from patchers.meta import build_on_meta
from patchers.probe import called_after_layers


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
    class that transformers treats as a decoder layer; or, where there is none, of a class of the model's own.

    Raises:
        FamilyError: There is no such list, or more than one.
    """
    count = layer_count(model.config)
    decoder = model.get_decoder()
    places = [decoder, model]  # there are heads that are called "decoder" (modernbert-decoder)
    found: list[tuple[str, nn.ModuleList]] = []
    for is_layer, place in itertools.product((_is_layer, _is_own), dict.fromkeys(places)):
        prefix = "" if place is model else name_in(model, place) + "."
        found = found or [
            (prefix + name, module)
            for name, module in place.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == count
            and all(is_layer(model, member) for member in module)
        ]
    if len(found) != 1:
        raise FamilyError(
            f"{type(model).__name__} has {len(found)} lists of {count} decoder layers "
            f"({', '.join(name for name, _ in found) or 'none'}), not one; pass a ModelDescriptor of your own"
        )
    return found[0]


def layer_count(config: PreTrainedConfig) -> int:
    """Return the number of decoder layers that a config asks for.

    Raises:
        FamilyError: The config does not say it.
    """
    count = getattr(config, "decoder_layers", None) or getattr(
        text_config_of(config), "num_hidden_layers", None
    )
    if not isinstance(count, int):
        raise FamilyError(
            f"{type(config).__name__} does not say how many decoder layers there are; pass a ModelDescriptor "
            "of your own"
        )
    return count


def _is_layer(model: PreTrainedModel, module: nn.Module) -> bool:
    unsplit = type(module).__name__ in (model._no_split_modules or ())
    return unsplit or isinstance(module, GradientCheckpointingLayer)


def _is_own(model: PreTrainedModel, module: nn.Module) -> bool:
    return type(module).__module__ == type(model).__module__


def name_in(model: nn.Module, wanted: nn.Module | None) -> str:
    """Return the dotted name of a module in a model."""
    return next(name for name, module in model.named_modules(remove_duplicate=False) if module is wanted)


def model_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a config on the meta device, with the layers that its own class gives it.

    Raises:
        FamilyError: Its class does not build it.
    """
    with unpatched():
        try:
            # grouped experts want widths that are a multiple of 8, which a layer need not have to be right
            return build_on_meta(model_class, config, torch.bfloat16, experts_implementation="eager")
        except Exception as error:
            raise FamilyError(
                f"{model_class.__name__} cannot be built of this config on the meta device: "
                f"{type(error).__name__}: {error}"
            ) from error


def final_norm_of(model: PreTrainedModel, layers: str) -> str | None:
    """Return the dotted name of the norm that comes after the layers, where there may be others, or None."""
    backbone_name, _, list_name = layers.rpartition(".")
    backbone = model.get_submodule(backbone_name)
    children = dict(backbone.named_children())
    names = list(children)
    norms = [name for name, child in children.items() if "norm" in type(child).__name__.lower()]
    after = [name for name in norms if names.index(name) > names.index(list_name)]
    if len(norms) > 1 or after != norms or any("emb" in name for name in norms):  # the order of use decides
        with unpatched(), torch.device("cpu"):
            used = called_after_layers(model, children[list_name], {name: children[name] for name in norms})
        after = after if used is None else used
    return f"{backbone_name}.{after[0]}".lstrip(".") if after else None
