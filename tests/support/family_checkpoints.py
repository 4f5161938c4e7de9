"""A checkpoint of each family, written by transformers once a session, and what transformers makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from patchers.descriptor import ModelDescriptor
from support.families import drawn_model, family_config


@dataclass(frozen=True)
class FamilyCheckpoint:
    """A checkpoint in float32, in several files.

    Attributes:
        folder: Where it is.
        reference: The whole model, loaded by transformers in bfloat16.
        num_blocks: How many blocks it has.
    """

    folder: Path
    reference: PreTrainedModel
    num_blocks: int

    @property
    def ownerships(self) -> list[set[int]]:
        """Two that are not contiguous and share the model between them, and a contiguous one."""
        blocks = range(self.num_blocks)
        return [set(blocks[::2]), set(blocks[1::2]), set(blocks[1:-1])]

    def keys_for(self, names: set[str]) -> set[str]:
        """The keys of the checkpoint that are made of tensors of the reference."""
        state = {name: value for name, value in self.reference.state_dict().items() if name in names}
        return set(revert_weight_conversion(self.reference, state))


_made: dict[tuple[Path, str, bool], FamilyCheckpoint] = {}


def family_checkpoint(parent: Path, family: str, *, tied: bool = False) -> FamilyCheckpoint:
    """The checkpoint of a family in a folder of session scope; nobody may change it."""
    if (parent, family, tied) not in _made:
        folder = parent / f"{family}{'-tied' if tied else ''}"
        config = family_config(family)
        for part in (config, config.get_text_config()) if tied else ():
            part.tie_word_embeddings = True
        model = drawn_model(config)
        model.save_pretrained(folder, max_shard_size="100KB")
        reference = type(model).from_pretrained(folder, dtype=torch.bfloat16)
        layers = reference.get_submodule(ModelDescriptor.from_config(reference.config).layers)
        count = sum(1 for _ in layers.children())
        _made[parent, family, tied] = FamilyCheckpoint(folder, reference, count)
    return _made[parent, family, tied]
