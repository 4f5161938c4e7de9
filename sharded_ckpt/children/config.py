"""The config.json of a child: that of its parent, saying other blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patchers.block_config import BlockConfig
from patchers.dialects import Dialect
from patchers.families import NATIVE_FAMILY
from sharded_ckpt.saving.carried_files import READABLE_AS_DECILM, config_saying

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_DTYPE_FIELDS = ("dtype", "torch_dtype")


def child_config(
    raw: Mapping[str, Any],
    native: PreTrainedConfig,
    architecture: str,
    blocks: Sequence[BlockConfig],
    *,
    dialect: Dialect | str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Return the content of a child's config.json.

    Args:
        raw: The parent's config.json.
        native: The same as a config of the native class.
        architecture: The native class.
        blocks: The child's, every size said.
        dialect: How to say them; by default as the parent does, and in AnyModel if it says nothing of single
            blocks. A DeciLM config that shall say them otherwise becomes one of the native class: the code
            that is published with it could not read it.
        dtype: What the weights were cast to, as torch calls it (`bfloat16`); None if they were not.

    Raises:
        BlockConfigError: The dialect cannot say these blocks.
    """
    chosen = None if dialect is None else Dialect(dialect)
    if raw.get("model_type") in NATIVE_FAMILY and chosen not in (None, *READABLE_AS_DECILM):
        raw = {**json.loads(native.to_json_string()), "architectures": [architecture]}
    config = config_saying(raw, blocks, chosen)
    if dtype is not None:
        said = [name for name in _DTYPE_FIELDS if name in raw] or list(_DTYPE_FIELDS[:1])
        config.update(dict.fromkeys(said, dtype))
    return config
