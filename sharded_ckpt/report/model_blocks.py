"""What the blocks of a model are, every size said: of a checkpoint or of a config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from patchers.base_sizes import BaseSizes, resolve_block
from patchers.block_config import BlockConfig
from patchers.block_words import block_table
from patchers.dialects import read_block_configs
from patchers.tables import as_html, as_text
from sharded_ckpt.checkpoint.source import holds_safetensors, open_source, read_config
from sharded_ckpt.ownership.counting import Countable
from sharded_ckpt.report.block_kinds import text_config
from sharded_ckpt.report.overview import overview


class ModelBlocks(tuple[BlockConfig | None, ...]):
    """What each block of a model is. Printed, and in a notebook, it is a table with one row a kind."""

    def __str__(self) -> str:
        return as_text([block_table(self)])

    def _repr_html_(self) -> str:
        return as_html([block_table(self)])


def model_blocks(model: Countable) -> ModelBlocks:
    """Say what each block of a model is.

    Args:
        model: A checkpoint (a directory, a hub id, or a URL), whose tensors tell where they are there; a
            config; or the content of a config.json.

    Returns:
        One entry a block of the language model; None where its tensors do not tell, sizes that nobody says
        at None.

    Raises:
        BlockConfigError: The config does not say the number of blocks.
        CheckpointError: The files are broken, or there is neither config nor weights.

    Example:
        >>> model_blocks(checkpoint)[1].ffn  # the path of a checkpoint
        FFNConfig(intermediate_size=96)
        >>> print(model_blocks(checkpoint))
        blocks  number  attention   FFN
        0-3     4       2 KV heads  96 wide
    """
    if isinstance(model, (str, os.PathLike)):
        source = open_source(model)
        if holds_safetensors(source):
            found = overview(model)
            return ModelBlocks(row.config for row in found.blocks if row.stack == found.stack)
        return _said(read_config(source))
    return _said(model if isinstance(model, Mapping) else model.to_dict())


def _said(config: Mapping[str, Any]) -> ModelBlocks:
    """Return what a config says; a nested one is that of the language model."""
    config = text_config(config) or config
    sizes = BaseSizes.of(config)
    told = read_block_configs(config)
    blocks = told[0] if told else [BlockConfig()] * sizes.num_hidden_layers
    return ModelBlocks(resolve_block(block, sizes, allow_open=True) for block in blocks)
