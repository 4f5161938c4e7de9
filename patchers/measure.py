"""Reading the sizes of a built layer back off the shapes of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from patchers.block_config import BlockConfig
from patchers.inference import infer_block_configs


def built_block(layer: nn.Module, base: Mapping[str, Any]) -> BlockConfig:
    """Return the block config that the shapes of a layer's parameters amount to.

    Args:
        layer: A decoder layer.
        base: The config of the model as a mapping.

    Raises:
        BlockConfigError: The shapes contradict each other.
    """
    shapes = {f"layers.0.{name}": tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    return infer_block_configs(shapes, {**base, "num_hidden_layers": 1})[0]
