"""The single fields of a block config: which are carried along unbuilt, and what values they may have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from patchers.errors import BlockConfigError

JsonScalar: TypeAlias = "bool | int | float | str | None"
Extra: TypeAlias = "tuple[tuple[str, JsonScalar], ...]"

# What published formats can ask for and this library does not build. Null or false asks for nothing and is
# carried along; anything else would be silently ignored by the native class, so it is refused.
UNBUILT_ATTENTION = {
    "window_length": "a window of its own for the attention of one block",
    "num_sink_tokens": "attention sinks",
    "use_prefill_window_in_sink_attention": "attention sinks",
    "unshifted_sink": "attention sinks",
    "sparsify": "sparse weights",
    "llama4": "Llama 4 attention settings of one block",
}
UNBUILT_FFN = {"sparsify": "sparse weights"}
UNBUILT_BLOCK = {"parallel_blocks": "several blocks side by side in one layer"}

# Carried along for a lossless round trip. The dialects compare them with the base config where that matters.
INFORMATIONAL_ATTENTION = frozenset({"weights_precision"})
INFORMATIONAL_FFN = frozenset({"weights_precision", "hidden_act", "gated", "ffn_mult"})


def refuse_unbuilt(values: Mapping[str, Any], part: str, unbuilt: Mapping[str, str]) -> None:
    """Raise if a field that is not built asks for something.

    Args:
        values: Fields of one part of a block.
        part: How the part is called in the message, `"attention"` for instance.
        unbuilt: What each field that is not built would ask for.

    Raises:
        BlockConfigError: A field of `unbuilt` is neither null nor false.
    """
    for name, what in unbuilt.items():
        value = values.get(name)
        if value is not None and value is not False:
            raise BlockConfigError(
                f"{part}.{name}={value!r} asks for {what}, which is not built; set it to null if the block "
                "does without, or run the model with the code that wrote this config"
            )


def whole_number(value: Any, name: str, least: int = 1) -> int | None:
    """Return `value` as an int (2.0 is 2), or None for None.

    Raises:
        BlockConfigError: It is no whole number, or less than `least`.
    """
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or value != value // 1 or value < least:
        expected = "a positive whole number" if least == 1 else f"a whole number of at least {least}"
        raise BlockConfigError(f"{name}={value!r} is not {expected}")
    return int(value)


def check_groups(
    heads: int | None,
    kv_heads: int | None,
    *,
    heads_name: str = "attention.num_attention_heads",
    hint: str = "",
) -> None:
    """Raise unless each KV head serves as many query heads as every other one; None is not known.

    Raises:
        BlockConfigError: The KV heads do not divide the query heads.
    """
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise BlockConfigError(
            f"attention.num_key_value_heads={kv_heads} does not divide {heads_name}={heads}{hint}"
        )


def checked_extra(
    extra: Mapping[str, Any] | Iterable[tuple[str, Any]],
    part: str,
    unbuilt: Mapping[str, str],
    informational: frozenset[str],
) -> Extra:
    """Return the fields that a part carries along, as sorted pairs.

    Raises:
        BlockConfigError: A field is not one that is carried along, asks for something that is not built, or
            has a value that is not a JSON scalar.
    """
    values = dict(extra)
    for name, value in values.items():
        if name not in informational and name not in unbuilt:
            raise BlockConfigError(f"{part}.extra has {name!r}, which is not a field that is carried along")
        if name in informational and not isinstance(value, bool | int | float | str | None):
            raise BlockConfigError(f"{part}.{name}={value!r} is not a number, a string, true, false or null")
    refuse_unbuilt(values, part, unbuilt)
    return tuple(sorted(values.items()))


@contextmanager
def at_block(index: int) -> Iterator[None]:
    """Name the block in any `BlockConfigError` that is raised inside."""
    try:
        yield
    except BlockConfigError as error:
        raise BlockConfigError(f"block {index}: {error}") from None
