"""A config of the kind that NAS publishes: like those of Llama-Nemotron, of any length, and nobody's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

_HEADS, _HIDDEN, _KV_HEADS = 64, 8192, 8
_MULTIPLIERS = (1.3125, 2.625, 3.5, 5.25)  # of FFN widths: 7168, 14336, 19200 and 28672
_WIDE = 15.75  # of a fused FFN, which stands in for the blocks around it


def published_kind(num_blocks: int = 162, seed: int = 0) -> dict[str, Any]:
    """Make up the content of a config.json in the nemotron-nas dialect.

    The ends are whole, as in what is published: runs of whole blocks and of blocks without attention and FFN
    take turns in the first two thirds; after them, attention is rare, and single wide FFNs stand in for those
    around them. A few attentions are linear layers.

    Args:
        num_blocks: Number of blocks.
        seed: Another one makes another model of that kind.

    Example:
        >>> config = published_kind(162)
        >>> len(config["block_configs"]), config["model_type"]
        (162, 'nemotron-nas')
    """
    generator = random.Random(seed)
    return {
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "block_configs": list(_blocks(num_blocks, generator)),
        "hidden_act": "silu",
        "hidden_size": _HIDDEN,
        "intermediate_size": None,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": _HEADS,
        "num_hidden_layers": num_blocks,
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }


def _blocks(num_blocks: int, generator: random.Random) -> Iterator[dict[str, Any]]:
    end = max(1, num_blocks // 20)
    left, is_run = 0, True
    for index in range(num_blocks):
        if not end <= index < num_blocks - end:
            yield _block("native", generator.choice(_MULTIPLIERS[:2]) if index < end else _MULTIPLIERS[1])
        elif index < 2 * num_blocks // 3:
            if not left:
                left, is_run = generator.randint(3, 7), not is_run
                multiplier = generator.choice(_MULTIPLIERS)
            left -= 1
            yield _block("native", multiplier) if is_run else _block("no-op", None)
        else:
            attention = generator.choices(("no-op", "native", "linear"), (9, 2, 1))[0]
            yield _block(attention, generator.choices((None, _MULTIPLIERS[1], _WIDE), (8, 1, 2))[0])


def _block(attention: str, multiplier: float | None) -> dict[str, Any]:
    is_native = attention == "native"
    return {
        "attention": {
            "n_heads_in_group": _HEADS // _KV_HEADS if is_native else None,
            "no_op": attention == "no-op",
            "replace_with_linear": attention == "linear",
        },
        "ffn": {"ffn_mult": multiplier, "no_op": multiplier is None, "replace_with_linear": False},
    }
