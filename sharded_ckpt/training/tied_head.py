"""Is the head the embedding? What the config says, and what is so in memory, are two things."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sharded_ckpt.distribute.distribution import global_name
from sharded_ckpt.saving.saved_tensors import unwrapped


def is_tied_word_embeddings(model: nn.Module) -> bool:
    """Return whether the config says that the head is the input embedding.

    Asked are the config itself, the `thinker_config` of an omni model, and the text config inside.
    """
    config = getattr(unwrapped(model), "config", None)
    inner = getattr(config, "get_text_config", lambda: None)()
    for candidate in (config, getattr(config, "thinker_config", None), inner):
        said = getattr(candidate, "tie_word_embeddings", None)
        if said is not None:
            return bool(said)
    return False


def has_local_tied_lm_head(model: nn.Module) -> bool:
    """Return whether the head and the embedding are, here, the very same memory, as the config says.

    False where only one of the two is on this rank, where they are on meta, and where they hold values of
    their own although the config calls them tied: then the head must be saved.
    """
    head, _ = _get_lm_head_weight_and_name(model)
    embedding = _embedding_weight(model)
    if head is None or embedding is None or not is_tied_word_embeddings(model):
        return False
    return head.shape == embedding.shape and is_same_memory(head, embedding)


def is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are the same memory read in the same way; of DTensors, the parts here."""
    if one is other:
        return not one.is_meta
    if one.is_meta or other.is_meta or one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = local_part(one), local_part(other)
    return one.numel() > 0 and one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a DTensor that is on this rank; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _get_lm_head_weight_and_name(model: nn.Module) -> tuple[torch.Tensor | None, str | None]:
    """Return the weight of the head and its global name; `(None, None)` if this shard has no head.

    The head is what the model itself calls its output embeddings, else the first parameter whose name has
    `lm_head` in it and ends in `.weight`. Names are without what torch.compile, FSDP and activation
    checkpointing put into them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    said = _weight_of(unwrapped(model), "get_output_embeddings")
    own = [name for name, parameter in parameters.items() if parameter is said]
    named = [name for name in parameters if "lm_head" in name and name.endswith(".weight")]
    for name in (*own[-1:], *named):  # a tied head has the embedding's name, too, and that one is first
        return parameters[name], global_name(name)
    return None, None


def _embedding_weight(model: nn.Module) -> torch.Tensor | None:
    weight = _weight_of(unwrapped(model), "get_input_embeddings")
    here = any(parameter is weight for parameter in model.parameters())
    return weight if here else None


def _weight_of(model: Any, getter: str) -> torch.Tensor | None:
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # what transformers raises where a family has no such part
        return None
    return getattr(module, "weight", None)
