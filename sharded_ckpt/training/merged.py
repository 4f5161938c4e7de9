"""Adapters put into the weights for an export, by peft's own arithmetic, one layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from patchers.errors import ConfigError
from sharded_ckpt.distribute.distribution import global_name
from sharded_ckpt.training.adapters import base_name, is_adapter_name, made_by_peft
from sharded_ckpt.training.transforms import BaseStateDictAdapter, StateDict

_SAVED = ".modules_to_save."


class MergedAdapters:
    """A `StateDictConverter` for a model made by peft: undone, its active adapters are in the weights.

    For LoRA a weight `W (out, in)` becomes `W + B @ A * scale`; DoRA and the rest are what peft makes of
    them. Modules that were trained whole (`modules_to_save`) take the place of the original ones. The live
    model stays as it is: each layer is merged in a copy.

    Args:
        model: The model made by peft; a shard of one on which no layer has an adapter may be any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def key_filter(self, fqn: str) -> bool:
        """Return whether a key is a part of an adapter."""
        return is_adapter_name(fqn)

    def state_dict_transform(self, state_dict: StateDict) -> StateDict:
        """Return the state dict of the model with merged weights, under the names of the base model.

        Args:
            state_dict: The model's own.

        Raises:
            ConfigError: It is the state dict of something else.
        """
        if not made_by_peft(self._model):
            return {name: value for name, value in state_dict.items() if not is_adapter_name(name)}
        merged = dict(self._merged())
        if strange := [name for name in merged if name not in state_dict]:
            raise ConfigError(
                f"{strange[0]} is in the model and not in the state dict: it is that of another one"
            )
        trained = {base_name(_original(name)): v for name, v in state_dict.items() if _SAVED in name}
        kept = {n: merged.get(n, v) for n, v in state_dict.items() if not is_adapter_name(n)}
        return {**{base_name(name): value for name, value in kept.items()}, **trained}

    def state_dict_adapter(self) -> BaseStateDictAdapter | None:
        """Return None: merged, nothing of the adapter is left."""
        return None

    def _merged(self) -> Iterator[tuple[str, Any]]:
        """Give the merged weights by the names that the unmerged ones have."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, layer in self._model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                twin = copy.deepcopy(layer)
                twin.merge(safe_merge=True)
                inner: Mapping[str, Any] = twin.get_base_layer().state_dict()
                for key, value in inner.items():
                    yield global_name(f"{name}.base_layer.{key}"), value


def _original(name: str) -> str:
    """Return the name of the module that a trained one takes the place of."""
    before, _, rest = name.partition(_SAVED)
    return f"{before}.{rest.partition('.')[2]}"
