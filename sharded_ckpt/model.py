"""Building a heterogeneous model without storage, and cutting it down to the blocks that one rank owns."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from patchers.deci_x import BlockConfigs, as_described
from patchers.descriptor import ModelDescriptor
from patchers.embedding_use import reads_embedding_everywhere
from patchers.errors import PartialModelError
from patchers.meta import build_on_meta
from patchers.names import fold
from patchers.substitutes import Unowned, UnownedBlock, UnownedEmbedding
from sharded_ckpt.ownership.plan import check_ownership
from sharded_ckpt.runtime import as_runtime
from sharded_ckpt.surgery import set_submodule
from sharded_ckpt.ties import remember_ties


def create_sharded_model(
    runtime: Any,
    descriptor: ModelDescriptor | str,
    model_config: PreTrainedConfig,
    owned_block_indexes: Iterable[int],
    device: torch.device | str | None = "meta",
    dtype: torch.dtype | None = torch.float32,
    *,
    block_configs: BlockConfigs | None = None,
) -> PreTrainedModel:
    """Build a model of which this rank owns some blocks.

    Args:
        runtime: Where we are; None for the default.
        descriptor: A `ModelDescriptor`, the name of a family, or `"auto"`.
        model_config: The config of the whole model; it is not changed.
        owned_block_indexes: The blocks to keep; all others become stubs without storage.
        device: `"meta"` for a skeleton to be filled. On any other device the owned parts are newly
            initialised, as transformers initialises a new model. None takes the runtime's.
        dtype: Of the parameters. None takes the config's.
        block_configs: One entry a block, in place of what the config says.

    Returns:
        The native class, in eval mode.

    Raises:
        OwnershipError: An index is no block of this model.
        ConfigError: The descriptor does not fit the config.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
        >>> shard = create_sharded_model(None, "llama", config, {1, 2})
        >>> sorted({name.split(".")[2] for name, _ in shard.named_parameters()})
        ['1', '2']
    """
    runtime = as_runtime(runtime)
    descriptor = ModelDescriptor.of(descriptor, model_config)
    model = build_skeleton(descriptor, model_config, dtype, block_configs)
    create_local_shard_(model, owned_block_indexes, descriptor, runtime)
    device = torch.device(runtime.device if device is None else device)
    return model if device.type == "meta" else _initialise(model, device)


def create_local_shard_(
    model: PreTrainedModel,
    owned_block_indexes: Iterable[int],
    descriptor: ModelDescriptor | str,
    runtime: Any = None,
) -> PreTrainedModel:
    """Cut a model down, in place, to the blocks that this rank owns.

    The first block's owner keeps the input embedding and what stands beside the language model (a vision
    tower, its projector), the last one's the final norm and the head. Families that read their embedding in
    later layers keep it on every rank. What is not owned becomes a stub: it holds no storage, and raises when
    the shard is called like a whole model.

    Args:
        model: A native model, on meta or with weights.
        owned_block_indexes: The blocks to keep.
        descriptor: A `ModelDescriptor`, the name of a family, or `"auto"`.
        runtime: Accepted for symmetry with the other verbs; nothing here depends on it.

    Returns:
        The same model.

    Raises:
        OwnershipError: An index is no block of this model.
    """
    descriptor = ModelDescriptor.of(descriptor, model.config)
    count = num_blocks(model, descriptor)
    owned = check_ownership(owned_block_indexes, count)
    needs_embedding = 0 not in owned and reads_embedding_everywhere(model, descriptor)
    arity = functools.partial(getattr, descriptor, "layer_arity")  # found out only if a stage asks
    for index in sorted(set(range(count)) - owned):
        _replace(model, descriptor.block_name(index), UnownedBlock, layer_idx=index, arity=arity)
    if 0 not in owned:
        if not needs_embedding:
            _replace(model, descriptor.embedding, UnownedEmbedding)
        for name in outer_modules(model, descriptor):
            _replace(model, name, Unowned)
    if count - 1 not in owned:
        for name in filter(None, (descriptor.final_norm, descriptor.head)):
            if _has_tensors(model.get_submodule(name)):  # some families use a bare norm in other places, too
                _replace(model, name, Unowned)
    if len(owned) < count:
        _keep_ties_within(model)
        _refuse_whole_model_methods(model)
    return model


def num_blocks(model: PreTrainedModel, descriptor: ModelDescriptor) -> int:
    """Return how many blocks a model has."""
    return sum(1 for _ in model.get_submodule(descriptor.layers).children())


def outer_modules(model: PreTrainedModel, descriptor: ModelDescriptor) -> list[str]:
    """Return the modules that stand beside the language model: vision and audio towers, their projectors.

    What they compute goes into the input embeddings, so they live with the first block. A plain language
    model has none.
    """
    inner = descriptor.layers.split(".")[:-1]  # the path to the backbone
    ends = [f"{end}." for end in (descriptor.embedding, descriptor.final_norm, descriptor.head) if end]
    found = []
    for depth, on_the_way in enumerate(inner):
        prefix = "".join(f"{name}." for name in inner[:depth])
        siblings = model.get_submodule(prefix.rstrip(".")).named_children()
        names = [
            f"{prefix}{name}" for name, module in siblings if name != on_the_way and _has_tensors(module)
        ]
        found += [name for name in names if not any(end.startswith(f"{name}.") for end in ends)]
    return found


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))


def build_skeleton(
    descriptor: ModelDescriptor,
    config: PreTrainedConfig,
    dtype: torch.dtype | None = None,
    block_configs: BlockConfigs | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Build the whole heterogeneous model on the meta device, in eval mode; the config is not changed."""
    with as_described(descriptor, config, block_configs):
        return build_on_meta(descriptor.model_class, config, dtype or config.dtype, attn_implementation)


def _initialise(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    model.to_empty(device=device)
    model.initialize_weights()
    model.tie_weights(recompute_mapping=False)
    return model


def _replace(model: PreTrainedModel, name: str, stub: type[Unowned], **options: Any) -> None:
    original = model.get_submodule(name)
    if not isinstance(original, Unowned):
        set_submodule(model, name, stub(_without_storage(original), name, **options).train(original.training))


def _without_storage(module: nn.Module) -> nn.Module:
    """Return a copy on meta: the module may be in use elsewhere, and its storage must not stay alive."""
    tensors = [*module.parameters(), *module.buffers()]
    if all(tensor.is_meta for tensor in tensors):
        return module
    memo: dict[int, Any] = {}
    for tensor in tensors:
        twin = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
        )
    return copy.deepcopy(module, memo)


def _keep_ties_within(model: PreTrainedModel) -> None:
    """Forget the ties to what is not owned: a later `tie_weights()` would turn their other end into meta."""
    ties = dict(model.all_tied_weights_keys)
    here = model.state_dict(keep_vars=True) if ties else {}
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.all_tied_weights_keys, part._tied_weights_keys = {}, {}
    kept = {target: source for target, source in ties.items() if target in here and source in here}
    model.all_tied_weights_keys, model._tied_weights_keys = kept, dict(kept)
    remember_ties(model, ties)


class _Refusal:
    """Stands in for a method that would be wrong on a partial shard; a class, so that the shard pickles."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise PartialModelError(self.message)


def _refuse_whole_model_methods(model: PreTrainedModel) -> None:
    part = "this shard owns only some of the blocks: "
    vars(model)["save_pretrained"] = _Refusal(
        f"{part}save_pretrained would write an incomplete checkpoint as if it were whole. Use "
        "sharded_ckpt.save_sharded_model(model_shard, '<dir>/model.safetensors') on every rank"
    )
    vars(model)["generate"] = _Refusal(
        f"{part}it does not own {_unowned_names(model)} and cannot generate by itself. Run it as a stage "
        "of a pipeline over the ranks, or load the whole model"
    )


def _unowned_names(model: PreTrainedModel) -> str:
    return fold(module.name for module in model.modules() if isinstance(module, Unowned))
