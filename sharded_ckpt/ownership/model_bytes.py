"""How many bytes the parts of a model take, measured on its skeleton: what the ranks deal out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from patchers.descriptor import ModelDescriptor


@dataclass(frozen=True)
class ModelBytes:
    """How many bytes the parts of a model take: each block, the embedding, and what the last rank holds."""

    blocks: tuple[int, ...]
    embedding: int
    head: int


def model_bytes(model: nn.Module, descriptor: ModelDescriptor) -> ModelBytes:
    """Measure a whole model (on meta, say) by its parameters and buffers. A tied head counts twice."""
    blocks = [_nbytes(block) for block in model.get_submodule(descriptor.layers).children()]
    ends = [name for name in (descriptor.final_norm, descriptor.head) if name is not None]
    head = sum(_nbytes(model.get_submodule(name)) for name in ends)
    return ModelBytes(tuple(blocks), _nbytes(model.get_submodule(descriptor.embedding)), head)


def _nbytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
