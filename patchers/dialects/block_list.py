"""One block in the dialects that list every block: Nemotron-NAS, transitional, AnyModel, Megatron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from patchers.base_sizes import BaseSizes, resolve_block, said_query_heads
from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig, MoEConfig
from patchers.block_fields import (
    INFORMATIONAL_ATTENTION,
    INFORMATIONAL_FFN,
    UNBUILT_ATTENTION,
    UNBUILT_BLOCK,
    UNBUILT_FFN,
    Extra,
    refuse_unbuilt,
    whole_number,
)
from patchers.dialects import nemotron
from patchers.dialects.dialect import Dialect, Fields, Layout
from patchers.errors import BlockConfigError

# Values that a dialect without such a field says by saying nothing. hidden_act has been compared with the
# base config before it gets here, and ffn_mult is another word for the width.
_SILENT = {"weights_precision": "bf16", "gated": True}
_SAID_ELSEWHERE = frozenset({"hidden_act", "ffn_mult"})


def read_block(raw: Mapping[str, Any], layout: Layout, base: BaseSizes) -> BlockConfig:
    """Read one entry of a block list. A part that is left out is as the base config says.

    Raises:
        BlockConfigError: A field is unknown, asks for something that is not built, or is out of range.
    """
    refuse_unknown(raw, layout.known_block, "the block", layout.dialect)
    refuse_unbuilt(raw, "block", UNBUILT_BLOCK)
    if layout.ffn_part in raw and "ffn" in raw and layout.ffn_part != "ffn":
        raise BlockConfigError(
            f"ffn and {layout.ffn_part} are two names of one part; keep the one that is meant"
        )
    ffn_part = layout.ffn_part if layout.ffn_part in raw else "ffn"
    return BlockConfig(
        _read_attention(_part(raw, "attention"), layout, base), _read_ffn(_part(raw, ffn_part), layout, base)
    )


def write_block(block: BlockConfig, layout: Layout, base: BaseSizes) -> dict[str, Any]:
    """Write one entry of a block list, with every size said and every field of the origin there.

    Raises:
        BlockConfigError: The dialect cannot say something of the block, or a size is said nowhere.
    """
    # megatron-core fills nulls from its own base config, as we do; the others must say every size. AnyModel
    # is for any family: where no config field says a size, the part is left out, which means the same.
    may_leave_out = layout.dialect is Dialect.ANYMODEL
    said = (
        block if layout.dialect is Dialect.MEGATRON else resolve_block(block, base, allow_open=may_leave_out)
    )
    refuse_lost(said.attention.extra, "attention", layout.attention, layout.dialect)
    refuse_lost(said.ffn.extra, "ffn", layout.ffn, layout.dialect)
    parts = {
        "attention": _write_attention(said.attention, layout, base),
        layout.ffn_part: _write_ffn(said.ffn, layout, base),
    }
    if may_leave_out and said.attention == AttentionConfig():
        del parts["attention"]
    if may_leave_out and said.ffn == FFNConfig():
        del parts[layout.ffn_part]
    return {**parts, **layout.block}


def refuse_unknown(raw: Mapping[str, Any], known: frozenset[str], where: str, dialect: Dialect) -> None:
    """Raise if a mapping has a field that its dialect has not, and name the nearest that it has."""
    for name in raw:
        if name not in known:
            near = get_close_matches(str(name), sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(sorted(known))}"
            raise BlockConfigError(
                f"{name!r} of {where} is not a field of the {dialect.value} dialect; {hint}"
            )


def refuse_lost(extra: Extra, part: str, written: Fields, dialect: Dialect) -> None:
    """Raise if a field that is carried along says something that the dialect to write has no field for."""
    for name, value in extra:
        silent = value is None or value is False or value == _SILENT.get(name)
        if not silent and name not in written and name not in _SAID_ELSEWHERE:
            raise BlockConfigError(
                f"{part}.{name}={value!r} cannot be said in {dialect.value}; drop it from the extra fields "
                "of the block, or write the dialect that was read"
            )


def _part(raw: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    part = raw.get(name)
    if name in raw and not isinstance(part, Mapping):
        raise BlockConfigError(
            f"{name} is {part!r}, which may mean 'as the base config says' or 'none at all'; leave it out "
            "for the "
            'first, say {"no_op": true} for the second'
        )
    return part


def _read_attention(raw: Mapping[str, Any] | None, layout: Layout, base: BaseSizes) -> AttentionConfig:
    if raw is None:
        return AttentionConfig()
    refuse_unknown(raw, layout.known_attention, "attention", layout.dialect)
    no_op, linear = _flags(raw)
    if no_op or linear:
        raw = _without_irrelevant(raw)
    refuse_unbuilt(raw, "attention", {**UNBUILT_ATTENTION, "mamba": "a state-space mixer"})
    extra = _extra(raw, frozenset(UNBUILT_ATTENTION) | INFORMATIONAL_ATTENTION)
    if no_op or linear:
        return AttentionConfig(None, no_op, linear, extra=extra)
    queries = raw.get(layout.query_heads) if layout.query_heads else None
    return AttentionConfig(_read_heads(raw, layout, base), num_attention_heads=queries, extra=extra)


def _read_heads(raw: Mapping[str, Any], layout: Layout, base: BaseSizes) -> int | None:
    name = f"attention.{layout.attention_size}"
    heads = whole_number(raw.get(layout.attention_size), name)
    _require_size(heads, name, layout)
    if heads is not None and layout.attention_size == "n_heads_in_group":
        return nemotron.kv_heads_of(heads, base.need("num_attention_heads"))
    return heads


def _read_ffn(raw: Mapping[str, Any] | None, layout: Layout, base: BaseSizes) -> FFNConfig:
    if raw is None:
        return FFNConfig()
    refuse_unknown(raw, layout.known_ffn, "ffn", layout.dialect)
    refuse_unbuilt(raw, "ffn", UNBUILT_FFN)
    extra = _extra(raw, frozenset(UNBUILT_FFN) | INFORMATIONAL_FFN)
    no_op, linear = _flags(raw)
    if no_op or linear:
        return FFNConfig(None, no_op, linear, extra=extra)
    width, moe = _read_width(raw, layout, base), _read_moe(raw.get("moe"), layout)
    _require_size(width or moe, f"ffn.{layout.ffn_size}", layout)
    return FFNConfig(width, moe=moe, extra=extra)


def _read_width(raw: Mapping[str, Any], layout: Layout, base: BaseSizes) -> int | None:
    said = None
    if layout.ffn_size != "ffn_mult":
        said = whole_number(raw.get(layout.ffn_size), f"ffn.{layout.ffn_size}")
    if raw.get("ffn_mult") is None:
        return said
    width = nemotron.width_of(raw["ffn_mult"], base.need("hidden_size"))
    if said is not None and said != width:
        raise BlockConfigError(
            f"ffn.{layout.ffn_size}={said}, but ffn.ffn_mult={raw['ffn_mult']} says {width}; keep the one "
            "that is meant"
        )
    return width


def _read_moe(raw: Any, layout: Layout) -> MoEConfig | None:
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise BlockConfigError(f"ffn.moe={raw!r} is not a mapping")
    refuse_unknown(raw, frozenset(spec.name for spec in fields(MoEConfig)), "ffn.moe", layout.dialect)
    return MoEConfig(**raw)


def _flags(raw: Mapping[str, Any]) -> tuple[bool, bool]:
    no_op, linear = raw.get("no_op"), raw.get("replace_with_linear")
    return (False if no_op is None else no_op), (False if linear is None else linear)


def _extra(raw: Mapping[str, Any], carried: frozenset[str]) -> Extra:
    return tuple(sorted((name, value) for name, value in raw.items() if name in carried))


def _without_irrelevant(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Null what the origin nulls, too, where there is no softmax attention: windows and sinks."""
    irrelevant = frozenset(UNBUILT_ATTENTION) - {"llama4"}
    return {name: None if name in irrelevant and value is not False else value for name, value in raw.items()}


def _require_size(size: object, name: str, layout: Layout) -> None:
    if size is None and layout.sizes_required:
        raise BlockConfigError(
            f"{name} is null, but the part is neither no_op nor replace_with_linear; a "
            f"{layout.dialect.value} config says every size in its blocks"
        )


def _write_attention(attention: AttentionConfig, layout: Layout, base: BaseSizes) -> dict[str, Any]:
    heads, queries = attention.num_key_value_heads, said_query_heads(attention, base)
    if queries is not None and layout.query_heads is None:
        raise BlockConfigError(
            f"attention.num_attention_heads={queries} cannot be said in {layout.dialect.value}; write "
            "anymodel or per-layer"
        )
    if heads is not None and layout.attention_size == "n_heads_in_group":
        heads = nemotron.n_heads_in_group_of(heads, base.need("num_attention_heads"))
    nulled = frozenset() if attention.is_native else layout.nulled
    written = _written(attention, layout.attention, {layout.attention_size: heads}, nulled)
    return written if queries is None else {**written, str(layout.query_heads): queries}


def _write_ffn(ffn: FFNConfig, layout: Layout, base: BaseSizes) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if ffn.moe is not None:
        if "moe" not in layout.ffn:
            raise BlockConfigError(
                f"ffn.moe cannot be said in {layout.dialect.value}; write anymodel or per-layer"
            )
        said["moe"] = {spec.name: getattr(ffn.moe, spec.name) for spec in fields(MoEConfig)}
    said[layout.ffn_size] = _written_width(ffn, layout, base)
    nulled = frozenset() if ffn.is_native and ffn.moe is None else layout.nulled
    return _written(ffn, {**layout.ffn, "hidden_act": base.hidden_act}, said, nulled, layout.ffn)


def _written_width(ffn: FFNConfig, layout: Layout, base: BaseSizes) -> int | float | None:
    width = ffn.intermediate_size
    if width is not None and layout.ffn_size == "ffn_mult":
        original: Any = dict(ffn.extra).get("ffn_mult")
        return nemotron.ffn_mult_of(width, base.need("hidden_size"), original)
    if width is not None and width % layout.width_multiple:
        raise BlockConfigError(
            f"ffn.intermediate_size={width} cannot be said in {layout.dialect.value}, whose widths are "
            f"multiples of {layout.width_multiple}; choose another width, or another dialect"
        )
    return width


def _written(
    part: AttentionConfig | FFNConfig,
    defaults: Fields,
    said: Mapping[str, Any],
    nulled: frozenset[str],
    order: Fields | None = None,
) -> dict[str, Any]:
    flags = {"no_op": part.no_op, "replace_with_linear": part.replace_with_linear}
    values = {**defaults, **dict(part.extra), **dict.fromkeys(nulled), **said, **flags}
    return {name: values[name] for name in order or defaults}
