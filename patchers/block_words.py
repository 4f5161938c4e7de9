"""What a block is, in a few words and as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig
from patchers.names import fold_indices
from patchers.tables import Table

UNKNOWN = "?"


def attention_words(block: BlockConfig | None) -> str:
    """Say what the attention of a block is.

    Example:
        >>> attention_words(BlockConfig(AttentionConfig(num_key_value_heads=8))), attention_words(None)
        ('8 KV heads', '?')
        >>> attention_words(BlockConfig(AttentionConfig(1, num_attention_heads=4)))
        '1 KV head of 4 heads'
    """
    if block is None:
        return UNKNOWN
    kv_heads, heads = block.attention.num_key_value_heads, block.attention.num_attention_heads
    words = UNKNOWN if kv_heads is None else f"{kv_heads} KV head{'s'[: kv_heads != 1]}"
    return _kind(block.attention) or (words if heads is None else f"{words} of {heads} heads")


def ffn_words(block: BlockConfig | None) -> str:
    """Say what the FFN of a block is.

    Example:
        >>> ffn_words(BlockConfig(ffn=FFNConfig(intermediate_size=14336)))
        '14336 wide'
        >>> ffn_words(BlockConfig(ffn=FFNConfig(no_op=True)))
        'no-op'
    """
    if block is None:
        return UNKNOWN
    ffn, moe = block.ffn, block.ffn.moe
    if moe is not None:
        shared = moe.shared_expert_intermediate_dim
        beside = f" + {shared} shared" if shared else ""
        return f"{moe.num_local_experts} experts, {moe.expert_intermediate_dim} wide{beside}"
    width = ffn.intermediate_size
    return _kind(ffn) or (UNKNOWN if width is None else f"{width} wide")


def block_table(blocks: Iterable[BlockConfig | None]) -> Table:
    """Set out blocks as a table, those that are alike in one row.

    Example:
        >>> wide, none = BlockConfig(ffn=FFNConfig(96)), BlockConfig(ffn=FFNConfig(no_op=True))
        >>> block_table([wide, none, wide]).rows
        [['blocks', 'number', 'attention', 'FFN'], ['0,2', '2', '?', '96 wide'], ['1', '1', '?', 'no-op']]
    """
    alike: dict[tuple[str, str], list[int]] = {}
    for index, block in enumerate(blocks):
        alike.setdefault((attention_words(block), ffn_words(block)), []).append(index)
    rows = [[fold_indices(of), str(len(of)), *words] for words, of in alike.items()]
    return Table([["blocks", "number", "attention", "FFN"], *rows])


def block_dict(block: BlockConfig) -> dict[str, Any]:
    """Return a block as plain data, without what it does not say.

    Example:
        >>> block_dict(BlockConfig(AttentionConfig(no_op=True), FFNConfig(64)))
        {'attention': {'no_op': True}, 'ffn': {'intermediate_size': 64}}
    """
    said = asdict(block)
    for part in said.values():
        part.pop("extra")
    return {
        name: {field: value for field, value in part.items() if value is not None and value is not False}
        for name, part in said.items()
    }


def _kind(part: AttentionConfig | FFNConfig) -> str | None:
    return "no-op" if part.no_op else "linear" if part.replace_with_linear else None
