"""Nemotron-NAS arithmetic: sizes said as ratios of the model's own sizes.

Source: the published DeciLM code (`modeling_decilm.py`, `block_config.py`), repeated alike in vLLM, SGLang,
TensorRT-LLM, llama.cpp and megatron-core.
"""

from __future__ import annotations

from patchers.errors import BlockConfigError

_WIDTH_MULTIPLE = 256
_DECIMALS = 6


def width_of(ffn_mult: float, hidden_size: int) -> int:
    """Return the FFN width that a multiplier says: two thirds of multiplier x hidden size, rounded up to 256.

    Raises:
        BlockConfigError: The multiplier is not a number, or says no width at all.

    Example:
        >>> width_of(2.625, 8192), width_of(1.0, 8192)
        (14336, 5632)
    """
    if isinstance(ffn_mult, bool) or not isinstance(ffn_mult, int | float):
        raise BlockConfigError(f"ffn.ffn_mult={ffn_mult!r} is not a number")
    # The published code rounds to six decimals, then truncates; both decide the width at its edges.
    width = _rounded_up(int(2 * round(ffn_mult, _DECIMALS) * hidden_size / 3))
    if width <= 0:
        raise BlockConfigError(
            f"ffn.ffn_mult={ffn_mult!r} says a width of {width} at hidden_size={hidden_size}"
        )
    return width


def ffn_mult_of(width: int, hidden_size: int, original: float | None = None) -> float:
    """Return a multiplier of at most six decimals that says exactly `width`.

    Args:
        width: FFN width.
        hidden_size: Hidden size of the model.
        original: A multiplier to keep if it still says that width.

    Raises:
        BlockConfigError: No multiplier says that width.

    Example:
        >>> ffn_mult_of(14336, 8192), ffn_mult_of(5632, 8192, original=1.0)
        (2.625, 1.0)
    """
    if original is not None and width_of(original, hidden_size) == width:
        return original
    nearest = round(3 * width / (2 * hidden_size), _DECIMALS)
    # The nearest may lie a hair above, which would round up to the next multiple: then one step less.
    for candidate in (nearest, round(nearest - 10**-_DECIMALS, _DECIMALS)):
        if candidate > 0 and width_of(candidate, hidden_size) == width:
            return candidate
    raise BlockConfigError(
        f"ffn.intermediate_size={width} cannot be said as ffn_mult, whose widths are multiples of "
        f"{_WIDTH_MULTIPLE}; choose {_rounded_up(width)}, or another dialect"
    )


def kv_heads_of(n_heads_in_group: int, num_attention_heads: int) -> int:
    """Return the KV heads where groups of this many attention heads share one.

    Raises:
        BlockConfigError: The groups do not divide the attention heads.
    """
    return _divided(num_attention_heads, n_heads_in_group, "attention.n_heads_in_group")


def n_heads_in_group_of(num_key_value_heads: int, num_attention_heads: int) -> int:
    """Return how many attention heads share one KV head.

    Raises:
        BlockConfigError: The KV heads do not divide the attention heads.
    """
    return _divided(num_attention_heads, num_key_value_heads, "attention.num_key_value_heads")


def _divided(num_attention_heads: int, parts: int, name: str) -> int:
    if num_attention_heads % parts:
        raise BlockConfigError(f"{name}={parts} does not divide num_attention_heads={num_attention_heads}")
    return num_attention_heads // parts


def _rounded_up(width: int) -> int:
    return -(-width // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
