"""What one block of a decoder is: frozen, validated dataclasses, free of torch.

The names are those of NVIDIA Model-Optimizer (`modelopt/torch/puzzletron/block_config.py`); other notations
are read and written by `patchers.dialects`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from patchers.block_fields import (
    INFORMATIONAL_ATTENTION,
    INFORMATIONAL_FFN,
    UNBUILT_ATTENTION,
    UNBUILT_FFN,
    Extra,
    check_groups,
    checked_extra,
    whole_number,
)
from patchers.errors import BlockConfigError


def _check_flags(no_op: object, replace_with_linear: object, part: str) -> None:
    for name, value in (("no_op", no_op), ("replace_with_linear", replace_with_linear)):
        if not isinstance(value, bool):
            raise BlockConfigError(f"{part}.{name}={value!r} is not true or false")
    if no_op and replace_with_linear:
        raise BlockConfigError(
            f"{part}.no_op and {part}.replace_with_linear are both set; a part is one or the other"
        )


def _set(config: object, name: str, value: object) -> None:
    object.__setattr__(config, name, value)


class _ShortRepr:
    """Show only what was set, so that 162 blocks can be read on a screen."""

    def __repr__(self) -> str:
        specs = [spec for spec in fields(self) if spec.compare]  # type: ignore[arg-type]
        values = [(spec.name, getattr(self, spec.name), spec.default) for spec in specs]
        shown = (f"{name}={value!r}" for name, value, default in values if value != default)
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class MoEConfig(_ShortRepr):
    """A mixture of experts in the place of a dense FFN. A size of None is as the base config says.

    Args:
        num_local_experts: Routed experts of the block.
        num_experts_per_tok: Routed experts that each token visits.
        expert_intermediate_dim: FFN width of one routed expert.
        shared_expert_intermediate_dim: FFN width of the expert that every token visits, 0 where there is
            none. NVIDIA's package writes 8192 for families that have none.

    Raises:
        BlockConfigError: A size is not a positive whole number, or a token would visit more experts than
            there are.

    Example:
        >>> MoEConfig(num_local_experts=8, num_experts_per_tok=2, expert_intermediate_dim=768)
        MoEConfig(num_local_experts=8, num_experts_per_tok=2, expert_intermediate_dim=768)
    """

    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    expert_intermediate_dim: int | None = None
    shared_expert_intermediate_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_local_experts", "num_experts_per_tok", "expert_intermediate_dim"):
            _set(self, name, whole_number(getattr(self, name), f"moe.{name}"))
        shared = whole_number(
            self.shared_expert_intermediate_dim, "moe.shared_expert_intermediate_dim", least=0
        )
        _set(self, "shared_expert_intermediate_dim", shared)
        experts, visited = self.num_local_experts, self.num_experts_per_tok
        if experts is not None and visited is not None and visited > experts:
            raise BlockConfigError(
                f"moe.num_experts_per_tok={visited} is more than moe.num_local_experts={experts}; "
                "a token cannot visit more experts than there are: lower num_experts_per_tok"
            )


@dataclass(frozen=True, repr=False)
class MambaConfig(_ShortRepr):
    """A state-space mixer in the place of attention; plain data, nothing is built with it yet.

    Args:
        state_dim: Size of the recurrent state of one channel.
        num_heads: Heads of the mixer.
        head_dim: Channels of one head.
        num_groups: Groups of heads that share the B and C projections.

    Raises:
        BlockConfigError: A size is not a positive whole number.
    """

    state_dim: int
    num_heads: int
    head_dim: int
    num_groups: int

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = whole_number(getattr(self, spec.name), f"mamba.{spec.name}")
            if value is None:
                raise BlockConfigError(f"mamba.{spec.name} is missing")
            _set(self, spec.name, value)


@dataclass(frozen=True, repr=False)
class AttentionConfig(_ShortRepr):
    """The attention of one block.

    Two configs are equal when they build the same: `extra` plays no part in that.

    Args:
        num_key_value_heads: KV heads; None is as the base config says. Nulled where no softmax attention is
            left.
        no_op: The attention and its norm are gone.
        replace_with_linear: One linear layer `(hidden, hidden)` without bias is in its place; the norm stays.
        mamba: A state-space mixer is in its place. Refused when block configs are parsed: not built yet.
        num_attention_heads: Query heads, of the same size (`head_dim`) as in all blocks; None is as the base
            config says. Nulled like the KV heads, which must divide them.
        extra: Fields of a config file that are carried along and not built: a mapping, kept as sorted pairs.

    Raises:
        BlockConfigError: `no_op`, `replace_with_linear` and `mamba` exclude each other; a size is not a
            positive whole number; the KV heads do not divide the query heads; `extra` asks for something that
            is not built.

    Example:
        >>> AttentionConfig(num_key_value_heads=8)
        AttentionConfig(num_key_value_heads=8)
        >>> AttentionConfig(2, num_attention_heads=6)
        AttentionConfig(num_key_value_heads=2, num_attention_heads=6)
        >>> AttentionConfig(num_key_value_heads=8, no_op=True) == AttentionConfig(no_op=True)
        True
    """

    num_key_value_heads: int | None = None
    no_op: bool = False
    replace_with_linear: bool = False
    mamba: MambaConfig | None = None
    num_attention_heads: int | None = field(default=None, kw_only=True)
    extra: Extra = field(default=(), compare=False, kw_only=True)

    def __post_init__(self) -> None:
        _check_flags(self.no_op, self.replace_with_linear, "attention")
        if self.mamba is not None and not isinstance(self.mamba, MambaConfig):
            raise BlockConfigError(f"attention.mamba must be a MambaConfig, found {self.mamba!r}")
        if self.mamba is not None and not self.is_native:
            raise BlockConfigError("attention.mamba excludes no_op and replace_with_linear; set one of them")
        for name in ("num_key_value_heads", "num_attention_heads"):
            heads = whole_number(getattr(self, name), f"attention.{name}")
            _set(self, name, heads if self.is_native and self.mamba is None else None)
        check_groups(self.num_attention_heads, self.num_key_value_heads)
        _set(
            self, "extra", checked_extra(self.extra, "attention", UNBUILT_ATTENTION, INFORMATIONAL_ATTENTION)
        )

    @property
    def is_native(self) -> bool:
        """Whether there is still a mixer: neither gone nor replaced by a linear layer."""
        return not (self.no_op or self.replace_with_linear)


@dataclass(frozen=True, repr=False)
class FFNConfig(_ShortRepr):
    """The feed-forward network of one block.

    Two configs are equal when they build the same: `extra` plays no part in that.

    Args:
        intermediate_size: FFN width; None is as the base config says. Nulled where no FFN is left.
        no_op: The FFN and its norm are gone.
        replace_with_linear: One linear layer `(hidden, hidden)` without bias is in its place; the norm stays.
        moe: A mixture of experts instead of a dense FFN. Nulled like the width.
        extra: Fields of a config file that are carried along and not built: a mapping, kept as sorted pairs.

    Raises:
        BlockConfigError: `no_op` and `replace_with_linear`, or `moe` and `intermediate_size`, are both set; a
            size is not a positive whole number; `extra` asks for something that is not built.

    Example:
        >>> FFNConfig(intermediate_size=14336)
        FFNConfig(intermediate_size=14336)
    """

    intermediate_size: int | None = None
    no_op: bool = False
    replace_with_linear: bool = False
    moe: MoEConfig | None = None
    extra: Extra = field(default=(), compare=False, kw_only=True)

    def __post_init__(self) -> None:
        _check_flags(self.no_op, self.replace_with_linear, "ffn")
        if self.moe is not None and not isinstance(self.moe, MoEConfig):
            raise BlockConfigError(f"ffn.moe must be a MoEConfig, found {self.moe!r}")
        if self.is_native and self.moe is not None and self.intermediate_size is not None:
            raise BlockConfigError(
                f"ffn.moe and ffn.intermediate_size={self.intermediate_size} are both set; "
                "the width of an expert is moe.expert_intermediate_dim"
            )
        width = whole_number(self.intermediate_size, "ffn.intermediate_size")
        _set(self, "intermediate_size", width if self.is_native else None)
        _set(self, "moe", self.moe if self.is_native else None)
        _set(self, "extra", checked_extra(self.extra, "ffn", UNBUILT_FFN, INFORMATIONAL_FFN))

    @property
    def is_native(self) -> bool:
        """Whether there is still an FFN: neither gone nor replaced by a linear layer."""
        return not (self.no_op or self.replace_with_linear)


@dataclass(frozen=True, repr=False)
class BlockConfig(_ShortRepr):
    """One block: its attention and its FFN. `BlockConfig()` is a block exactly as the base config says.

    None for a part is refused, since it could mean "as the base config says" or "none at all". The first is
    the default, the second is `no_op=True`.

    Raises:
        BlockConfigError: A part is None or of another type.

    Example:
        >>> BlockConfig(AttentionConfig(no_op=True), FFNConfig(intermediate_size=7168))
        BlockConfig(attention=AttentionConfig(no_op=True), ffn=FFNConfig(intermediate_size=7168))
    """

    attention: AttentionConfig = AttentionConfig()
    ffn: FFNConfig = FFNConfig()

    def _repr_html_(self) -> str:
        from patchers.block_words import block_table
        from patchers.tables import as_html

        return as_html([block_table([self])])

    def __post_init__(self) -> None:
        for name, kind in (("attention", AttentionConfig), ("ffn", FFNConfig)):
            if not isinstance(getattr(self, name), kind):
                raise BlockConfigError(
                    f"{name} must be {kind.__name__}, found {getattr(self, name)!r}; leave it out for a "
                    f"block as the base config says, give {kind.__name__}(no_op=True) for none at all; dicts "
                    "are read by parse_blocks"
                )
