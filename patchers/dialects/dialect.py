"""The dialects by name, and what a block looks like in those of them that list every block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from patchers.block_fields import UNBUILT_ATTENTION, UNBUILT_BLOCK, UNBUILT_FFN, JsonScalar
from patchers.errors import BlockConfigError


class Dialect(str, Enum):
    """A notation for block configs.

    Attributes:
        NEMOTRON_NAS: DeciLM; the published Llama-Nemotron models (`model_type: nemotron-nas`).
        TRANSITIONAL: Early Puzzletron: DeciLM's attention with FFN widths in plain numbers.
        ANYMODEL: NVIDIA Model-Optimizer's Puzzletron: `block_configs` beside the config of any family.
        PER_LAYER: transformers' own `per_layer_config`: sparse, in the family's own field names.
        MEGATRON: megatron-core's `heterogeneous_layers_config_encoded_json`.
    """

    NEMOTRON_NAS = "nemotron-nas"
    TRANSITIONAL = "transitional"
    ANYMODEL = "anymodel"
    PER_LAYER = "per-layer"
    MEGATRON = "megatron"

    @classmethod
    def _missing_(cls, value: object) -> Dialect:
        raise BlockConfigError(
            f"{value!r} is not a dialect; known dialects: {', '.join(d.value for d in cls)}"
        )


Fields = Mapping[str, JsonScalar]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a dialect that lists every block writes one: its fields with their defaults, in the order written.

    Args:
        dialect: The dialect.
        attention: Fields of the attention part.
        ffn: Fields of the FFN part.
        block: Fields of the block beside its parts.
        attention_size: The field that says the KV heads.
        query_heads: The field that says the query heads, in blocks that have others than the base config
            says; None where the dialect has no word for them.
        ffn_size: The field that says the FFN width.
        ffn_part: What the FFN part is called.
        also_known: Fields of either part that are read but not written.
        nulled: Fields that the origin nulls where there is no softmax attention, no dense FFN.
        sizes_required: Whether a native part must say its size, because the base config does not.
        width_multiple: A width that is no multiple of this cannot be said.
    """

    dialect: Dialect
    attention: Fields
    ffn: Fields
    block: Fields = field(default_factory=dict)
    attention_size: str
    query_heads: str | None = None
    ffn_size: str
    ffn_part: str = "ffn"
    also_known: frozenset[str] = frozenset({"weights_precision"})
    nulled: frozenset[str] = frozenset()
    sizes_required: bool = False
    width_multiple: int = 1

    @property
    def known_attention(self) -> frozenset[str]:
        """Names that may be in the attention part."""
        own = frozenset(self.attention) | ({self.query_heads} if self.query_heads else frozenset())
        return own | frozenset(UNBUILT_ATTENTION) | self.also_known | {"mamba"}

    @property
    def known_ffn(self) -> frozenset[str]:
        """Names that may be in the FFN part."""
        return frozenset(self.ffn) | frozenset(UNBUILT_FFN) | self.also_known | {"hidden_act", "gated"}

    @property
    def known_block(self) -> frozenset[str]:
        """Names that may be in a block. megatron-core reads the FFN part under either name."""
        return frozenset({"attention", "ffn", self.ffn_part}) | frozenset(UNBUILT_BLOCK)


_FLAGS: Fields = {"no_op": False, "replace_with_linear": False}
_SINKS: Fields = {"unshifted_sink": False, "use_prefill_window_in_sink_attention": False}

# Sources: the published config.json files of Llama-3_3-Nemotron-Super-49B-v1 and
# Llama-3_1-Nemotron-Ultra-253B-v1; block_config.py of puzzletron as it was (transitional) and as it is
# (AnyModel) in NVIDIA Model-Optimizer; megatron/core/transformer/heterogeneous/heterogeneous_config.py.
_NEMOTRON_NAS = Layout(
    dialect=Dialect.NEMOTRON_NAS,
    attention={
        "n_heads_in_group": None,
        "no_op": False,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        **_SINKS,
        "window_length": None,
    },
    ffn={"ffn_mult": None, **_FLAGS, "sparsify": None},
    attention_size="n_heads_in_group",
    ffn_size="ffn_mult",
    sizes_required=True,
    width_multiple=256,
)
_TRANSITIONAL = Layout(
    dialect=Dialect.TRANSITIONAL,
    attention={
        "llama4": None,
        "mamba": None,
        "n_heads_in_group": None,
        "no_op": False,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        **_SINKS,
        "weights_precision": "bf16",
        "window_length": None,
    },
    ffn={
        "gated": True,
        "hidden_act": None,
        "intermediate_size": None,
        "moe": None,
        **_FLAGS,
        "sparsify": None,
        "weights_precision": "bf16",
    },
    block={"parallel_blocks": None},
    attention_size="n_heads_in_group",
    ffn_size="intermediate_size",
    also_known=frozenset({"weights_precision", "ffn_mult"}),
    nulled=frozenset({*_SINKS, "gated", "hidden_act"}),
    sizes_required=True,
    width_multiple=256,
)
_ANYMODEL = Layout(
    dialect=Dialect.ANYMODEL,
    attention={
        "llama4": None,
        "mamba": None,
        "no_op": False,
        "num_key_value_heads": None,
        "replace_with_linear": False,
        "sparsify": None,
        "weights_precision": "bf16",
    },
    ffn={"intermediate_size": None, "moe": None, **_FLAGS, "sparsify": None, "weights_precision": "bf16"},
    block={"parallel_blocks": None},
    attention_size="num_key_value_heads",
    query_heads="num_attention_heads",  # ours: NVIDIA's package has no word for it, and never prunes them
    ffn_size="intermediate_size",
)
_MEGATRON = Layout(
    dialect=Dialect.MEGATRON,
    attention={**_FLAGS, "num_query_groups": None},
    ffn={**_FLAGS, "ffn_hidden_size": None},
    attention_size="num_query_groups",
    ffn_size="ffn_hidden_size",
    ffn_part="mlp",
)
LAYOUTS = {layout.dialect: layout for layout in (_NEMOTRON_NAS, _TRANSITIONAL, _ANYMODEL, _MEGATRON)}
