"""Putting substitutes in the place of what a block config removes from a layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig
from patchers.descriptor import ModelDescriptor
from patchers.errors import FamilyError
from patchers.kv_sharing import blocks_that_share
from patchers.probe import SubBlock
from patchers.substitutes import LinearAttention, LinearFFN, NoAttention, NoFFN, NoNorm


def substitute(
    layer: nn.Module, descriptor: ModelDescriptor, block: BlockConfig, hidden_size: int, index: int
) -> None:
    """Exchange the parts of a layer that its block config removes or replaces.

    Args:
        layer: As its own class has built it.
        descriptor: Of the model.
        block: What is asked of this layer.
        hidden_size: Of the model.
        index: Of the layer.

    Raises:
        FamilyError: The family cannot do without the part, or has no single part to replace.
    """
    kind = descriptor.kind_of(layer)
    _refuse_unsupported("attention", kind.attention, block.attention, descriptor.family, index)
    _refuse_unsupported("FFN", kind.ffn, block.ffn, descriptor.family, index)
    if not block.attention.is_native:
        refuse_lenders(layer, kind.attention, descriptor.family, index, "no attention of its own")
    if block.attention.no_op:
        # several mixers of one layer share a cache slot, in which the tokens are counted once
        for number, part in enumerate(kind.attention):
            gone = NoFFN(part.arity, part.residual) if number else _no_attention(part, index)
            _exchange(layer, part, gone, drop_norms=True)
    elif block.attention.replace_with_linear:
        part = kind.attention[0]
        _exchange(layer, part, LinearAttention(hidden_size, index, part.arity, part.residual))
    if block.ffn.no_op:
        for part in kind.ffn:
            _exchange(layer, part, NoFFN(part.arity, part.residual), drop_norms=True)
    elif block.ffn.replace_with_linear:
        part = kind.ffn[0]
        _exchange(layer, part, LinearFFN(hidden_size, part.arity, part.residual))


def why_not_removed(parts: tuple[SubBlock, ...], family: str) -> str | None:
    """Return why a part of a layer cannot be removed, or None if it can."""
    if all(part.removable for part in parts):
        return None
    return f"in {family} a layer without it is not the identity: zeros in its place would be silently wrong"


def why_not_linear(kind: str, parts: tuple[SubBlock, ...], family: str) -> str | None:
    """Return why a part of a layer cannot be replaced by one linear layer, or None if it can."""
    if len(parts) == 1:
        return why_not_removed(parts, family)
    names = ", ".join(part.name for part in parts) or "none at all"
    return f"this layer of {family} has no single {kind} in whose place it could stand ({names})"


def _refuse_unsupported(
    kind: str, parts: tuple[SubBlock, ...], wanted: AttentionConfig | FFNConfig, family: str, index: int
) -> None:
    if wanted.no_op and (why := why_not_removed(parts, family)):
        raise FamilyError(f"block {index} removes its {kind}, but {why}")
    if wanted.replace_with_linear and (why := why_not_linear(kind, parts, family)):
        raise FamilyError(f"block {index} replaces its {kind} by a linear layer, but {why}")


def _no_attention(part: SubBlock, index: int) -> NoAttention:
    return NoAttention(index, part.arity, part.residual)


def refuse_lenders(
    layer: nn.Module, parts: tuple[SubBlock, ...], family: str, index: int, change: str
) -> None:
    """Refuse to change an attention whose keys and values later layers use (gemma3n, gemma4).

    Raises:
        FamilyError: It is such a one.
    """
    for part in parts:
        attention: Any = layer.get_submodule(part.name)
        lends = getattr(attention, "store_full_length_kv", False)
        if lends and blocks_that_share(getattr(attention, "config", None)):
            raise FamilyError(
                f"block {index} has {change}, but later layers of this {family} model use its keys and "
                "values (num_kv_shared_layers): change theirs, not this one"
            )


def _exchange(layer: nn.Module, part: SubBlock, substitute: nn.Module, drop_norms: bool = False) -> None:
    # models read plain attributes of their parts, whatever these are (gemma4: is_kv_shared_layer)
    for name, value in vars(layer.get_submodule(part.name)).items():
        if isinstance(value, (bool, int, str)) and not hasattr(substitute, name):
            setattr(substitute, name, value)
    layer.set_submodule(part.name, substitute)
    for norm in part.norms if drop_norms else ():
        setattr(layer, norm, NoNorm())
