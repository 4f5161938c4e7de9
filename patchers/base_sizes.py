"""What the config of a model says about all its blocks alike, under whatever names its family uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig, MoEConfig
from patchers.block_fields import whole_number
from patchers.errors import BlockConfigError

_Part = TypeVar("_Part", AttentionConfig, FFNConfig)

SIZE_FIELDS: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "num_query_groups"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "hidden_act": ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act", "activation"),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"),
    "shared_expert_intermediate_size": (
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_intermediate_size",
    ),
}
"""The names under which configs of transformers' families say a size. Of each, the first that a config has is
taken to say it for the whole model."""

SHARED_EXPERT_COUNTS = (
    "n_shared_experts",
    "moe_num_shared_experts",
    "num_shared_expert",
    "num_shared_experts",
)
"""The names of the number of shared experts, where the shared expert is a multiple of a routed one."""


@dataclass(frozen=True, kw_only=True)
class FieldNames:
    """The names under which a family's config says the sizes of its blocks. The defaults are llama's."""

    num_hidden_layers: str = "num_hidden_layers"
    hidden_size: str = "hidden_size"
    num_attention_heads: str = "num_attention_heads"
    num_key_value_heads: str = "num_key_value_heads"
    intermediate_size: str = "intermediate_size"
    hidden_act: str = "hidden_act"
    num_experts: str = "num_local_experts"
    num_experts_per_tok: str = "num_experts_per_tok"
    expert_intermediate_size: str = "intermediate_size"
    shared_expert_intermediate_size: str = "shared_expert_intermediate_size"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> FieldNames:
        """Return the names that a config uses: of each size, the first known name that is in it.

        Example:
            >>> FieldNames.of({"n_layer": 12, "n_embd": 768}).hidden_size
            'n_embd'
        """
        found = {
            size: next((alias for alias in aliases if alias in config), aliases[0])
            for size, aliases in SIZE_FIELDS.items()
        }
        # Families either give experts a width of their own or reuse the dense one (mixtral, gpt_oss).
        own_width = config.get("moe_intermediate_size") is not None
        expert = "moe_intermediate_size" if own_width else found["intermediate_size"]
        return cls(expert_intermediate_size=expert, **found)


@dataclass(frozen=True, kw_only=True)
class BaseSizes:
    """The sizes of every block that does not say otherwise; None where the config is silent.

    Args:
        names: Where each size was looked for.
        raw: The config that this was read from.
    """

    names: FieldNames
    raw: Mapping[str, Any]
    num_hidden_layers: int
    hidden_size: int | None
    num_attention_heads: int | None
    head_dim: int | None
    num_key_value_heads: int | None
    intermediate_size: int | None
    hidden_act: str | None
    moe: MoEConfig | None

    @classmethod
    def of(cls, config: Mapping[str, Any], names: FieldNames | None = None) -> BaseSizes:
        """Read the base sizes out of a raw `config.json`.

        Args:
            config: The config as a mapping. For a model inside a model (vision-language), its text config.
            names: The names of the family; found by `FieldNames.of` when not given.

        Raises:
            BlockConfigError: The number of layers is missing, a size is no positive whole number, or the text
                model is nested.
        """
        names = names or FieldNames.of(config)
        layers = _size(config, names.num_hidden_layers) or _listed_layers(config)
        if layers is None:
            raise BlockConfigError(_no_layers(config, names))
        hidden, heads = _size(config, names.hidden_size), _size(config, names.num_attention_heads)
        return cls(
            names=names,
            raw=config,
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            head_dim=_size(config, "head_dim") or _even_head_dim(hidden, heads),
            num_key_value_heads=_size(config, names.num_key_value_heads),
            intermediate_size=_size(config, names.intermediate_size),
            hidden_act=config.get(names.hidden_act),
            moe=_base_moe(config, names),
        )

    def need(self, size: str) -> int:
        """Return a size, by the name of its attribute, that the config must say.

        Raises:
            BlockConfigError: The config does not say it.
        """
        value: int | None = getattr(self, size)
        if value is None:
            raise BlockConfigError(
                f"the base config does not say {getattr(self.names, size, size)}, which is needed"
            )
        return value


def resolve_block(block: BlockConfig, base: BaseSizes, *, allow_open: bool = False) -> BlockConfig:
    """Return the block with every size said: those left at None are taken from the base config.

    Only query heads are said where they differ from the base config's, and nowhere else.

    Args:
        block: Of the model.
        base: What its config says.
        allow_open: Whether what the base config does not say either may stay unsaid.

    Raises:
        BlockConfigError: The base config does not say a size either. In a mixture-of-experts family it says
            nothing of which blocks are dense: the family's own rules decide that.
    """
    attention = replace(block.attention, num_attention_heads=said_query_heads(block.attention, base))
    attention = _if_said(_resolve_attention, attention, base, allow_open)
    ffn = _if_said(_resolve_ffn, block.ffn, base, allow_open)
    if allow_open and ffn.moe is not None and block.ffn.moe is not None and not _says_shared(base):
        shared = block.ffn.moe.shared_expert_intermediate_dim  # there may be one, of the family's own width
        ffn = replace(ffn, moe=replace(ffn.moe, shared_expert_intermediate_dim=shared))
    return replace(block, attention=attention, ffn=ffn)


def _says_shared(base: BaseSizes) -> bool:
    """Whether it is known that a block of experts has a shared one, or none."""
    return base.moe is None or base.moe.shared_expert_intermediate_dim is not None


def _if_said(
    resolve: Callable[[_Part, BaseSizes], _Part], part: _Part, base: BaseSizes, allow_open: bool
) -> _Part:
    try:
        return resolve(part, base)
    except BlockConfigError:
        if allow_open:
            return part
        raise


def said_query_heads(attention: AttentionConfig, base: BaseSizes) -> int | None:
    """Return the query heads of a block if they are others than the base config says, else None."""
    heads = attention.num_attention_heads
    return None if heads == base.num_attention_heads else heads


def _resolve_attention(attention: AttentionConfig, base: BaseSizes) -> AttentionConfig:
    if not attention.is_native or attention.mamba is not None or attention.num_key_value_heads is not None:
        return attention
    name = base.names.num_key_value_heads
    heads = _said(base.num_key_value_heads, "attention.num_key_value_heads", name)
    return replace(attention, num_key_value_heads=heads)


def _resolve_ffn(ffn: FFNConfig, base: BaseSizes) -> FFNConfig:
    if ffn.moe is not None:
        return replace(ffn, moe=_resolve_moe(ffn.moe, base))
    if not ffn.is_native or ffn.intermediate_size is not None:
        return ffn
    if base.moe is not None:
        raise BlockConfigError(
            "ffn says neither intermediate_size nor moe, and the base config of a mixture-of-experts "
            "family does not tell which blocks are dense; say one of them (infer_block_configs reads "
            "them off a checkpoint)"
        )
    width = _said(base.intermediate_size, "ffn.intermediate_size", base.names.intermediate_size)
    return replace(ffn, intermediate_size=width)


def _resolve_moe(moe: MoEConfig, base: BaseSizes) -> MoEConfig:
    general = base.moe or MoEConfig()
    base_fields = {
        "num_local_experts": base.names.num_experts,
        "num_experts_per_tok": base.names.num_experts_per_tok,
        "expert_intermediate_dim": base.names.expert_intermediate_size,
    }
    sizes = {
        field: getattr(moe, field) or _said(getattr(general, field), f"ffn.moe.{field}", base_field)
        for field, base_field in base_fields.items()
    }
    shared = moe.shared_expert_intermediate_dim
    general_shared = general.shared_expert_intermediate_dim or 0
    return MoEConfig(**sizes, shared_expert_intermediate_dim=general_shared if shared is None else shared)


def _said(value: int | None, field: str, base_field: str) -> int:
    if value is None:
        raise BlockConfigError(
            f"{field} is not set, and the base config does not say {base_field}; set one of them"
        )
    return value


def _base_moe(config: Mapping[str, Any], names: FieldNames) -> MoEConfig | None:
    experts = _size(config, names.num_experts, least=0)  # 0 in dense siblings (granitemoehybrid)
    if not experts:
        return None
    width = _size(config, names.expert_intermediate_size)
    shared = _size(config, names.shared_expert_intermediate_size, least=0)
    counts = (_size(config, name, least=0) for name in SHARED_EXPERT_COUNTS)
    count = next((count for count in counts if count is not None), None)
    if shared is None and count is not None and width is not None:
        shared = count * width
    return MoEConfig(experts, _size(config, names.num_experts_per_tok), width, shared)


def _even_head_dim(hidden: int | None, heads: int | None) -> int | None:
    return hidden // heads if hidden and heads and hidden % heads == 0 else None


def _listed_layers(config: Mapping[str, Any]) -> int | None:
    """The number of layers where a config only lists their kinds (nemotron_h)."""
    kinds = config.get("layers_block_type")
    return len(kinds) if isinstance(kinds, list | tuple) else None


def _no_layers(config: Mapping[str, Any], names: FieldNames) -> str:
    if "text_config" in config:
        return (
            "the config nests its text model in text_config, and block configs of nested (vision-language) "
            "models are not supported; pass config['text_config'] to work on the text model alone"
        )
    return f"the base config does not say {names.num_hidden_layers}, so the number of blocks is unknown"


def _size(config: Mapping[str, Any], name: str, least: int = 1) -> int | None:
    value = config.get(name)
    # A list gives each layer its own value (gemma3n): no single size holds for all blocks.
    return None if isinstance(value, list | tuple) else whole_number(value, name, least)
