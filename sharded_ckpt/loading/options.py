"""How a shard is to be loaded: what a caller of `load_and_shard_model` may choose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from patchers.deci_x import BlockConfigs
from patchers.descriptor import ModelDescriptor
from patchers.errors import ConfigError


@dataclass(frozen=True)
class LoadOptions:
    """How a shard is to be loaded. See `sharded_ckpt.load_and_shard_model`."""

    descriptor: ModelDescriptor | str = "auto"
    owned: Iterable[int] | str = "auto"
    config: PreTrainedConfig | None = None
    block_configs: BlockConfigs | None = None
    dtype: torch.dtype | str | None = None
    device: torch.device | str | None = None
    strict: bool = True
    materialize: bool = False
    route: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    is_read_ahead: bool = False


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype of a name such as "bfloat16".

    Raises:
        ConfigError: torch has no floating dtype of that name.
    """
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f'dtype is {name!r}; expected a floating one: "bfloat16", "float16", "float32", …, or "auto"'
        )
    return found
