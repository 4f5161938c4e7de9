"""The model of a load before anything is read: on meta, described, and cut down to what a rank owns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from patchers.alike import AlikeBlocks
from patchers.deci_x import blocks_of
from patchers.descriptor import ModelDescriptor, plain_class_of
from patchers.meta import build_on_meta
from sharded_ckpt.loading.options import LoadOptions
from sharded_ckpt.model import build_skeleton, create_local_shard_


@dataclass(frozen=True)
class Skeleton:
    """A model on meta with its descriptor.

    Of a plain family whose blocks are all alike, only blocks that are owned are built, and the model
    describes itself instead of another one that is built to look at: more than a third of a warm load.

    Attributes:
        descriptor: Where the model keeps its parts.
        model: Whole in names and shapes.
    """

    descriptor: ModelDescriptor
    model: PreTrainedModel
    _alike: AlikeBlocks = field(default_factory=AlikeBlocks)

    @classmethod
    def of(cls, options: LoadOptions, config: PreTrainedConfig, dtype: torch.dtype) -> Skeleton:
        """Build the model that is asked for; the config is not changed."""
        what, attention = options.descriptor, options.attn_implementation
        model_class = plain_class_of(config) if what in ("auto", config.model_type) else None
        if model_class is None or blocks_of(config, options.block_configs) is not None:
            descriptor = ModelDescriptor.of(what, config)
            return cls(
                descriptor, build_skeleton(descriptor, config, dtype, options.block_configs, attention)
            )
        alike = AlikeBlocks()
        with alike.unbuilt(model_class):
            model = build_on_meta(model_class, config, dtype, attention)
        return cls(ModelDescriptor.from_skeleton(model), model, alike)

    def cut_to(self, owned: Collection[int]) -> None:
        """Keep the blocks that are owned, built, and stubs of all others, in place."""
        blocks = self.model.get_submodule(self.descriptor.layers)
        for index in owned:
            self._alike.build(blocks[index])  # type: ignore[index]
        create_local_shard_(self.model, owned, self.descriptor)
