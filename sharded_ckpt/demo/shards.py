"""Tensors to safetensors files with an index, as transformers lays them out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_size: str) -> None:
    """Write `model-0000r-of-0000n.safetensors` and their index, or one `model.safetensors` if all fits.

    Args:
        folder: An existing directory.
        tensors: By name; none shares memory with another.
        max_shard_size: Upper limit of a file, as in `save_pretrained` ("60MB").
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
