"""Proof that a shard holds the bits of its files, read a second time by safetensors itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.index import INDEX_FILE

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Comparison:
    """What a comparison of a shard with its files found.

    Attributes:
        equal: How many tensors have the same dtype, shape and bits.
        differing: The names of the others.
    """

    equal: int
    differing: tuple[str, ...]


def compare_with_files(shard: PreTrainedModel, folder: Path) -> Comparison:
    """Compare every tensor of a shard, bit by bit, with what `safetensors.safe_open` reads from the files.

    Nothing of this project takes part in finding or reading the tensors of the files.

    Args:
        shard: As loaded, without a cast.
        folder: A checkpoint with an index. A tied head has no tensor there: it must equal the embedding.

    Raises:
        CheckpointError: The shard has a tensor that the index does not name.
    """
    from safetensors import safe_open

    files = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    keys = {name: name if name in files else _tied_to(shard, name) for name in shard.state_dict()}
    tensors, differing = shard.state_dict(), []
    for file in sorted({files[key] for key in keys.values()}):
        with safe_open(folder / file, framework="pt") as opened:
            for name in (name for name, key in keys.items() if files[key] == file):
                if not same_bits(tensors[name], opened.get_tensor(keys[name])):
                    differing.append(name)
    return Comparison(len(keys) - len(differing), tuple(sorted(differing)))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; equal NaNs are equal here, 0 and -0 are not.

    Example:
        >>> import torch
        >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
        False
    """
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(
        *(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )


def _tied_to(shard: PreTrainedModel, name: str) -> str:
    from patchers.descriptor import ModelDescriptor

    descriptor = ModelDescriptor.of("auto", shard.config)
    if not (shard.config.tie_word_embeddings and name == f"{descriptor.head}.weight"):
        raise CheckpointError(f"the shard has a tensor {name}, but the index does not name it")
    return f"{descriptor.embedding}.weight"
