"""Block configs read off a checkpoint itself: what the names and shapes of its tensors say.

Only names and shapes are needed, so the headers of safetensors files suffice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from patchers.base_sizes import BaseSizes, FieldNames, resolve_block
from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig, MoEConfig
from patchers.block_fields import at_block
from patchers.block_shapes import Tensor, infer_attention, infer_experts, infer_ffn, shown
from patchers.dialects import read_block_configs
from patchers.errors import BlockConfigError
from patchers.families import NATIVE_FAMILY, PLAIN_FAMILIES
from patchers.names import fold, fold_indices, split_block
from patchers.tensor_roles import TensorRole, role_of


def infer_block_configs(
    tensors: Mapping[str, Any],
    base: Mapping[str, Any],
    *,
    layers: str | None = None,
    names: FieldNames | None = None,
) -> list[BlockConfig]:
    """Infer the block configs of a checkpoint from the names and shapes of its tensors.

    Every size comes out said, query heads where they are not those of the config. A part without any tensor
    is a no-op, and so is a whole block.

    Args:
        tensors: Shapes by tensor name: tuples, or anything with a `shape`.
        base: The config of the model as a mapping: it says the layers, the hidden size and the heads.
        layers: Where the blocks are, `"model.layers"` for instance; found if there is only one such place.
        names: The family's own field names; found by `FieldNames.of` when not given.

    Raises:
        BlockConfigError: Shapes contradict each other or the config; tensors of a part are missing; or a part
            has tensors, but none that tells what it is (another kind of mixer, packed quantised weights).

    Example:
        >>> base = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4}
        >>> shapes = {"gate_proj": (32, 8), "up_proj": (32, 8), "down_proj": (8, 32)}
        >>> tensors = {f"model.layers.1.mlp.{name}.weight": shape for name, shape in shapes.items()}
        >>> infer_block_configs(tensors, base)[1]
        BlockConfig(attention=AttentionConfig(no_op=True), ffn=FFNConfig(intermediate_size=32))
    """
    sizes = BaseSizes.of(base, names)
    blocks = _blocks(tensors, sizes, layers)
    inferred = []
    for index in range(sizes.num_hidden_layers):
        with at_block(index):
            inferred.append(_infer_block(blocks.get(index, {}), sizes))
    _refuse_mixed_gates(blocks)
    _refuse_unfounded_heads(inferred, sizes)
    return inferred


def _blocks(tensors: Mapping[str, Any], sizes: BaseSizes, layers: str | None) -> dict[int, _Block]:
    stacks = _stacks(tensors)
    blocks = stacks.get(_the_stack(stacks, tensors) if layers is None else layers, {})
    if layers is not None and tensors and not blocks:
        raise BlockConfigError(
            f"no tensor is under {layers}; blocks are under {', '.join(stacks) or 'no name'}"
        )
    _refuse_beyond(blocks, sizes)
    return blocks


def contradictions(
    raw: Mapping[str, Any], found: Sequence[BlockConfig | None]
) -> dict[int, tuple[BlockConfig, BlockConfig]]:
    """Return the blocks of which a config says something else than their tensors.

    A config that says nothing of single blocks is held to that only in families whose tensors are known by
    their names.

    Args:
        raw: The content of a config.json.
        found: What the tensors are, as `infer_block_configs` tells it; None where nothing is known.

    Returns:
        What the config says and what was found, by block.

    Raises:
        BlockConfigError: The config cannot be read.
    """
    told = read_block_configs(raw)
    if told is None and raw.get("model_type") not in PLAIN_FAMILIES:
        return {}
    sizes = BaseSizes.of(raw)
    blocks = told[0] if told else [BlockConfig()] * len(found)
    said = [resolve_block(block, sizes, allow_open=True) for block in blocks]
    pairs = enumerate(zip(said, found, strict=True))
    return {index: (a, b) for index, (a, b) in pairs if b is not None and not _agree(a, b)}


def _agree(said: BlockConfig, found: BlockConfig) -> bool:
    """Whether a block is as it is said to be, as far as both tell; top-k shows in no tensor."""
    attention, ffn = found.attention, found.ffn
    if said.attention.is_native and said.attention.num_key_value_heads is None and attention.is_native:
        attention = replace(attention, num_key_value_heads=None)
    if said.ffn.is_native and ffn.is_native and said.ffn.intermediate_size is None:
        if said.ffn.moe is None:
            ffn = said.ffn
        elif ffn.moe is not None:
            unseen = {
                field.name: getattr(said.ffn.moe, field.name)
                for field in fields(MoEConfig)
                if field.name == "num_experts_per_tok" or getattr(said.ffn.moe, field.name) is None
            }
            ffn = replace(ffn, moe=replace(ffn.moe, **unseen))
    return said == BlockConfig(attention, ffn)


_Block = dict[str, Tensor]
# Families whose heads are of hidden size by heads where their config says no head_dim.
_DIVIDED = {"llama", "mistral", "qwen2", *NATIVE_FAMILY}


def _stacks(tensors: Mapping[str, Any]) -> dict[str, dict[int, _Block]]:
    """The tensors of each list of blocks, by block and name within the block: full name and shape."""
    stacks: dict[str, dict[int, _Block]] = {}
    for key, tensor in tensors.items():
        if place := split_block(key):
            stack, index, name = place
            block = stacks.setdefault(stack, {}).setdefault(index, {})
            block[name] = (key, tuple(getattr(tensor, "shape", tensor)))
    return stacks


def _the_stack(stacks: Mapping[str, object], tensors: Mapping[str, Any]) -> str:
    if len(stacks) == 1 or not tensors:
        return next(iter(stacks), "")
    if not stacks:
        some = fold(tensors, limit=4)
        raise BlockConfigError(f"no tensor belongs to a block (…layers.N.…, …h.N.…); the names are {some}")
    raise BlockConfigError(
        f"there are blocks in {len(stacks)} places: {', '.join(sorted(stacks))}; say which with layers="
    )


def _refuse_beyond(blocks: Mapping[int, _Block], sizes: BaseSizes) -> None:
    count = sizes.num_hidden_layers
    keys = [key for index, block in blocks.items() if index >= count for key, _ in block.values()]
    if keys:
        raise BlockConfigError(
            f"{fold(keys, limit=4)}: beyond the last block, since {sizes.names.num_hidden_layers}={count}; "
            "correct the config, or leave these tensors out"
        )


def _infer_block(block: _Block, sizes: BaseSizes) -> BlockConfig:
    parts: dict[str, dict[TensorRole, Tensor]] = {}
    attention_modules: set[str] = set()
    ffn_modules: set[str] = set()
    untold: _Block = {}
    for name, tensor in block.items():
        role = role_of(name)
        if role is not None and not name.endswith("bias"):
            _add(parts.setdefault(role.part, {}), role, tensor)
            modules = attention_modules if role.part == "attention" else ffn_modules
            modules.add(name.partition(".")[0])
        elif len(tensor[1]) > 1:  # vectors are norms, biases and scales: they make no part on their own
            untold[name] = tensor
    attention = {role.projection: tensor for role, tensor in parts.pop("attention", {}).items()}
    ffn = {role.projection: tensor for role, tensor in parts.pop("ffn", {}).items()}
    if not attention.keys() & {"k", "qkv", "linear"}:
        _refuse_untold(untold, ffn_modules, "attention")
    if not (ffn or parts):
        _refuse_untold(untold, attention_modules, "FFN")
    if parts and ffn:
        raise BlockConfigError(f"{shown(ffn.values())} beside experts: a dense FFN and experts in one block")
    return BlockConfig(
        infer_attention(attention, sizes) if attention else AttentionConfig(no_op=True),
        infer_experts(parts, sizes) if parts else infer_ffn(ffn, sizes) if ffn else FFNConfig(no_op=True),
    )


def _add(part: dict[TensorRole, Any], role: TensorRole, tensor: Tensor) -> None:
    if role in part:
        raise BlockConfigError(f"two tensors for one place: {shown([part[role], tensor])}")
    part[role] = tensor


def _refuse_untold(untold: _Block, others: set[str], part: str) -> None:
    """Raise rather than take a part for gone when tensors are left, outside other parts, that may be it."""
    left = [tensor for name, tensor in untold.items() if name.partition(".")[0] not in others]
    if left:
        raise BlockConfigError(
            f"no {part} of a known kind, but tensors that may be one: {shown(left)}; if they are another "
            "kind of layer or packed (quantised) weights, give the block configs instead of inferring them"
        )


def _refuse_unfounded_heads(blocks: Sequence[BlockConfig], sizes: BaseSizes) -> None:
    """Raise rather than count query heads by a size of heads that nothing confirms.

    Where a config does not say `head_dim`, most families divide hidden size by heads, and some have a number
    of their own (gemma, qwen3). A block with the config's heads is proof enough that it was divided.
    """
    divided = sizes.raw.get("head_dim") is not None or sizes.raw.get("model_type") in _DIVIDED
    attentions = [block.attention for block in blocks if block.attention.is_native]
    others = [attention.num_attention_heads for attention in attentions]
    if not divided and others and None not in others:
        raise BlockConfigError(
            f"no attention fits {sizes.num_attention_heads} heads of {sizes.head_dim}; the config says no "
            "head_dim: add it, or correct num_attention_heads"
        )


def _refuse_mixed_gates(blocks: Mapping[int, _Block]) -> None:
    gated: dict[bool, list[int]] = {}
    for index, block in blocks.items():
        roles = (role_of(name) for name in block if not name.endswith("bias"))
        dense = {role.projection for role in roles if role is not None and role.part == "ffn"}
        if dense - {"linear"}:
            gated.setdefault(bool(dense & {"gate", "gate_up"}), []).append(index)
    if len(gated) > 1:
        with_gate, without = fold_indices(gated[True]), fold_indices(gated[False])
        raise BlockConfigError(
            f"blocks {with_gate} have a gate in their FFN, blocks {without} have none: gate_proj is missing "
            "there"
        )
