"""A model's state in one of several views: to resume, to be filled from a base model, or for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from patchers.errors import ConfigError
from sharded_ckpt.training.model_state import ModelState
from sharded_ckpt.training.transforms import StateDictMode, StateDictTransforms


class ModelWrapper(ModelState):
    """A `ModelState` whose state dict comes in modes. Nothing is cached: every call says what is so now.

    Args:
        model: A model, a shard of one, or a list of parts.
        key_filter: Which keys converters own; none if not given.
        state_dict_transform: What undoes the converters.
        transforms: Both of these, from a `StateDictTransforms`.

    Raises:
        ConfigError: Both `transforms` and one of the others were given.

    Example:
        >>> wrapper = ModelWrapper(nn.Linear(2, 2), key_filter=lambda fqn: fqn == "bias")
        >>> list(wrapper.state_dict("base")), list(wrapper.state_dict("adapter"))
        (['weight'], ['bias'])
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        *,
        key_filter: Callable[[str], bool] | None = None,
        state_dict_transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        transforms: StateDictTransforms | None = None,
    ) -> None:
        if transforms is not None and (key_filter or state_dict_transform):
            raise ConfigError("pass transforms, or key_filter and state_dict_transform, not both")
        super().__init__(model)
        has_converters = transforms is not None and bool(transforms.converters)
        self._key_filter = transforms.key_filter if transforms and has_converters else key_filter
        self._undo = (
            transforms.state_dict_transform if transforms and has_converters else state_dict_transform
        )

    @property
    def has_key_filter(self) -> bool:
        """Whether any converter can own keys."""
        return self._key_filter is not None

    @property
    def has_frozen_params(self) -> bool:
        """Whether any parameter is not trained."""
        return any(not parameter.requires_grad for part in self.model for parameter in part.parameters())

    def state_dict(self, mode: StateDictMode | str = StateDictMode.FULL) -> dict[str, Any]:
        """Return the state dict of a mode.

        Args:
            mode: `full`: everything, as it is. `base`: without the keys that converters own. `adapter`: these
                alone. `export`: with every converter undone; the same as `full` if there is none.

        Raises:
            ConfigError: There is no such mode.
        """
        mode, state = StateDictMode.of(mode), super().state_dict()
        if mode is StateDictMode.EXPORT and self._undo is not None:
            return self._undo(state)
        if mode is StateDictMode.BASE:
            return {fqn: value for fqn, value in state.items() if not self._owned(fqn)}
        if mode is StateDictMode.ADAPTER:
            return {fqn: value for fqn, value in state.items() if self._owned(fqn)}
        return state

    def _owned(self, fqn: str) -> bool:
        return self._key_filter is not None and self._key_filter(fqn)
