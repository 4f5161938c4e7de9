"""The config that one decoder layer sees: the model's own, read through, with that layer's sizes on top.

A copy would go stale: `set_attn_implementation` changes the model's config only, after which the parent
builds masks for one implementation while a layer with a copied config runs another, and causality is silently
lost.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, cast

from transformers import PreTrainedConfig

_BASE, _OVERRIDES = "_layer_config_base", "_layer_config_overrides"


def layer_config(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a view of `config` with some attributes overridden.

    Data that is not overridden is read from, and written to, `config` itself, at the time of the access.
    Methods and properties of the config's class run on the view, so that what they derive follows the
    overrides. The view pickles, and a deep copy of a model gives views of the copied config.

    Args:
        config: The config of the whole model (not a view).
        overrides: Attribute values of this layer, by the config's own field names or aliases of them.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(intermediate_size=64)
        >>> view = layer_config(config, {"intermediate_size": 32})
        >>> config.attention_bias = True
        >>> view.intermediate_size, view.attention_bias, config.intermediate_size
        (32, True, 64)
    """
    aliases = type(config).attribute_map
    view: Any = object.__new__(_view_class(type(config)))  # type: ignore[arg-type]
    view.__dict__[_BASE] = config
    view.__dict__[_OVERRIDES] = {aliases.get(name, name): value for name, value in overrides.items()}
    return cast(PreTrainedConfig, view)


def base_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config that a view reads through to, or the config itself."""
    return cast(PreTrainedConfig, vars(config).get(_BASE, config))


class _ReadThrough:
    """The behaviour that turns a config class into a class of views."""

    attribute_map: Mapping[str, str]

    def __init__(self) -> None:
        raise TypeError("a layer's config is made by layer_config(config, overrides)")

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if name in ("__dict__", "__class__") or _BASE not in own:
            return object.__getattribute__(self, name)
        name = type(self).attribute_map.get(name, name) if name != "attribute_map" else name
        if name in own[_OVERRIDES]:
            return own[_OVERRIDES][name]
        base = own[_BASE]
        return getattr(base, name) if name in vars(base) else super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = object.__getattribute__(self, "__dict__")
        name = type(self).attribute_map.get(name, name)
        if name in own[_OVERRIDES]:
            own[_OVERRIDES][name] = value
        else:
            setattr(own[_BASE], name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return what this layer sees as a plain dict."""
        own = object.__getattribute__(self, "__dict__")
        return {**own[_BASE].to_dict(), **own[_OVERRIDES]}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        own = object.__getattribute__(self, "__dict__")
        return layer_config, (own[_BASE], own[_OVERRIDES])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        own = object.__getattribute__(self, "__dict__")
        twin = layer_config(copy.deepcopy(own[_BASE], memo), own[_OVERRIDES])
        memo[id(self)] = twin
        return twin


@functools.cache
def _view_class(config_class: type[PreTrainedConfig]) -> type:
    bases = (_ReadThrough, config_class)
    # its own __init__ in the body keeps PreTrainedConfig from generating one
    return type(f"Layer{config_class.__name__}", bases, {"__init__": _ReadThrough.__init__})
