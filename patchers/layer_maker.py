"""Building one decoder layer, and twins of it, with some attributes of its config overridden."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from patchers.activation import unpatched
from patchers.layer_config import base_config, layer_config
from patchers.meta import without_storage

NO_INDEX = object()
_INDEX_ARGUMENTS = ("layer_idx", "layer_id", "idx", "layer_number", "layer_index", "i")


class LayerMaker:
    """How a model builds one of its decoder layers.

    Attributes:
        layer: The layer, not built yet.
        config: The model's config, which its class is given; None if it is given none.
        index: The layer's index, `NO_INDEX` if its class is not given one.
        native: What transformers' own per_layer_config says of the layer.
        seen: The config as the layer would see it.
    """

    def __init__(
        self, layer: nn.Module, true_init: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.layer, self._true_init = layer, true_init
        self._call = inspect.signature(true_init).bind(layer, *args, **kwargs)
        self._call.apply_defaults()
        arguments = self._call.arguments
        self._config_name, given = next(
            ((name, value) for name, value in arguments.items() if isinstance(value, PreTrainedConfig)),
            ("", None),
        )
        self.config = None if given is None else base_config(given)
        self.index: Any = next((arguments[name] for name in _INDEX_ARGUMENTS if name in arguments), NO_INDEX)
        self.native: dict[str, Any] = {}
        self.seen: Any = self.config
        if self.config is not None and isinstance(self.index, int):
            self.native = _native_overrides(self.config, self.index)
            self.seen = layer_config(self.config, self.native) if self.native else self.config

    def into(self, layer: nn.Module, overrides: Mapping[str, Any]) -> None:
        """Initialise a layer of the same class."""
        call = copy.copy(self._call)
        call.arguments = dict(self._call.arguments)
        if self.config is not None:
            call.arguments[self._config_name] = layer_config(self.config, {**self.native, **overrides})
        call.arguments[next(iter(call.arguments))] = layer
        self._true_init(*call.args, **call.kwargs)

    def on_meta(self, overrides: Mapping[str, Any]) -> nn.Module:
        """Return a layer of the same class without storage."""
        twin = type(self.layer).__new__(type(self.layer))
        with unpatched(), without_storage():
            self.into(twin, overrides)
        return twin


def _native_overrides(config: PreTrainedConfig, index: int) -> dict[str, Any]:
    native = vars(config).get("_heterogeneity_spec")
    if not native or not 0 <= index < len(config.per_layer_config):
        return {}
    said = config.per_layer_config[index]
    return {name: getattr(said, name) for name in native.per_layer_attributes}
