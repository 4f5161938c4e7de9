"""What blocks cost, from block configs and the base config alone: no weights, no torch.

The formulas are those of the llama shape: q, k, v, o; gate, up, down; a norm before each part. What a family
adds to that (biases of q, k, v or norms of q and k where no flag in the config says so) is far below 0.1 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchers.base_sizes import BaseSizes, resolve_block
from patchers.block_config import BlockConfig, FFNConfig
from patchers.errors import ConfigError
from patchers.families import NATIVE_FAMILY, PLAIN_FAMILIES

MEASURES = ("bytes", "parameters", "count", "flops", "bytes+kv")
"""What costs can be counted in."""

LLAMA_SHAPED = PLAIN_FAMILIES | NATIVE_FAMILY.keys()
"""Families (config `model_type`) whose costs follow from the formulas here."""


@dataclass(frozen=True)
class ModelCosts:
    """The costs of a model's parts.

    Attributes:
        blocks: The cost of each block.
        embedding: That of the embedding and of what stands beside the language model (a vision tower): they
            live with the first block.
        head: That of final norm and head, which live with the last block; a tied head counts in full.
        by: The measure: one of `MEASURES`, or "seconds" where they were measured.
        everywhere: That of what every rank has, whatever it owns: a position embedding, say.
    """

    blocks: tuple[float, ...]
    embedding: float = 0
    head: float = 0
    by: str = "bytes"
    everywhere: float = 0

    @property
    def loads(self) -> tuple[float, ...]:
        """The cost of each block together with what lives beside it."""
        if len(self.blocks) == 1:
            return (self.embedding + self.blocks[0] + self.head,)
        first, *middle, last = self.blocks
        return (self.embedding + first, *middle, last + self.head)

    @property
    def total(self) -> float:
        """The cost of the whole model on one rank."""
        return sum(self.loads) + self.everywhere


def model_costs(
    blocks: Sequence[BlockConfig],
    config: Mapping[str, Any],
    *,
    by: str = "bytes",
    dtype_bytes: float = 2,
    batch: int = 1,
    length: int = 4096,
) -> ModelCosts:
    """Return what each part of a model costs.

    Args:
        blocks: The block configs.
        config: The model's config as a mapping (`config.json`).
        by: "bytes" or "parameters" of the weights; "count" of blocks; "flops" of one forward pass over
            `batch` sequences of `length` tokens, causal; "bytes+kv" of the weights and a full KV cache.
        dtype_bytes: Bytes of a parameter and of a cache element.
        batch: Sequences.
        length: Tokens of a sequence.

    Raises:
        ConfigError: The measure is not known, the config lacks a size that is needed, or its family has other
            parts than the formulas know; `skeleton_costs` counts any family.

    Example:
        >>> config = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2,
        ...           "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 10}
        >>> model_costs([BlockConfig()], config, by="parameters")
        ModelCosts(blocks=(592,), embedding=80, head=88, by='parameters', everywhere=0)
    """
    if by not in MEASURES:
        raise ConfigError(f"costs cannot be counted by {by!r}; choose one of {', '.join(MEASURES)}")
    if by == "count":
        return ModelCosts((1,) * len(blocks), 0, 0, by)
    family = config.get("model_type", "llama")
    if family not in LLAMA_SHAPED:
        raise ConfigError(
            f"the formulas count blocks of the llama shape, not those of {family!r}; skeleton_costs(config) "
            "counts them on the native model, without weights"
        )
    shape = _Shape.of(config)
    resolved = [resolve_block(block, shape.base) for block in blocks]
    if by == "flops":
        tokens = batch * length
        flops = tuple(shape.flops(block, tokens, length) for block in resolved)
        return ModelCosts(flops, 0, 2 * tokens * shape.vocabulary, by)
    size = 1 if by == "parameters" else dtype_bytes
    cached = batch * length if by == "bytes+kv" else 0
    costs = tuple(size * (shape.parameters(block) + cached * shape.cached(block)) for block in resolved)
    return ModelCosts(costs, size * shape.vocabulary, size * (shape.vocabulary + shape.hidden), by)


@dataclass(frozen=True)
class _Shape:
    """The sizes that all blocks of a model share."""

    base: BaseSizes
    hidden: int
    heads: int
    head_dim: int
    vocabulary: int  # parameters of the embedding
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Shape:
        base = BaseSizes.of(config)
        if not isinstance(config.get("vocab_size"), int):
            raise ConfigError("the base config does not say vocab_size, which is needed")
        hidden = base.need("hidden_size")
        return cls(
            base,
            hidden,
            base.need("num_attention_heads"),
            base.need("head_dim"),
            config["vocab_size"] * hidden,
            bool(config.get("attention_bias")),
            bool(config.get("mlp_bias")),
        )

    def parameters(self, block: BlockConfig) -> int:
        """Return the parameters of a block: matrices, norms, biases."""
        norms = (not block.attention.no_op) + (not block.ffn.no_op)
        biases = 0
        if self.attention_bias and block.attention.is_native:
            biases += (self._heads(block) + 2 * _kv_heads(block)) * self.head_dim + self.hidden
        if self.mlp_bias and block.ffn.intermediate_size:
            biases += 2 * block.ffn.intermediate_size + self.hidden
        return self._attention(block) + self._ffn(block.ffn) + norms * self.hidden + biases

    def flops(self, block: BlockConfig, tokens: int, length: int) -> int:
        """Return the operations of a forward pass: two for each weight that a token meets, and attention."""
        matrices = self._attention(block) + self._ffn(block.ffn, active=True)
        scores = length * self._heads(block) * self.head_dim if block.attention.is_native else 0
        return 2 * tokens * (matrices + scores)

    def cached(self, block: BlockConfig) -> int:
        """Return the elements that one token leaves in the KV cache."""
        return 2 * _kv_heads(block) * self.head_dim if block.attention.is_native else 0

    def _attention(self, block: BlockConfig) -> int:
        attention = block.attention
        if attention.mamba is not None:
            raise ConfigError("costs of a state-space mixer (attention.mamba) are not known")
        if not attention.is_native:
            return 0 if attention.no_op else self.hidden**2
        return 2 * self.hidden * self.head_dim * (self._heads(block) + _kv_heads(block))

    def _heads(self, block: BlockConfig) -> int:
        return block.attention.num_attention_heads or self.heads

    def _ffn(self, ffn: FFNConfig, active: bool = False) -> int:
        if not ffn.is_native:
            return 0 if ffn.no_op else self.hidden**2
        if ffn.moe is None:
            return 3 * self.hidden * (ffn.intermediate_size or 0)
        experts = ffn.moe.num_local_experts or 0
        met = (ffn.moe.num_experts_per_tok or 0) if active else experts
        width = met * (ffn.moe.expert_intermediate_dim or 0) + (ffn.moe.shared_expert_intermediate_dim or 0)
        return self.hidden * (3 * width + experts)


def _kv_heads(block: BlockConfig) -> int:
    return block.attention.num_key_value_heads or 0
