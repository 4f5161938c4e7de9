"""What modules say of themselves that decides how their state can be handled."""

from __future__ import annotations

from typing import Final

from torch import nn

_QUANTISED_WEIGHTS: Final = frozenset({"Params4bit", "Int8Params"})


def _has_expert_parallelism(model: nn.Module) -> bool:
    """Return whether any module says that its experts are spread over ranks (`ep_size` above 1)."""
    sizes = (getattr(module, "ep_size", None) for module in model.modules())
    return any(isinstance(size, int) and size > 1 for size in sizes)


def _has_quantized_params(model: nn.Module) -> bool:
    """Return whether any module is quantised by bitsandbytes."""
    return any(_is_quantized_module(module) for module in model.modules())


def _is_quantized_module(module: nn.Module) -> bool:
    """Return whether a module is quantised by bitsandbytes.

    Its 4-bit modules have a `quant_state`; its 8-bit ones have none, and are told by the class of their
    weight.
    """
    if getattr(module, "quant_state", None) is not None:
        return True
    weight = module._parameters.get("weight")
    return type(weight).__name__ in _QUANTISED_WEIGHTS or getattr(weight, "quant_state", None) is not None
