"""The two ways in which tensors of a checkpoint reach the parameters of a shard.

*Direct*: they are assigned as they are. Fast, and open only to families whose checkpoints are known by test
to have the names, shapes and dtypes of the modules. *Converted*: transformers' own loader does it, with its
renames, fused experts and dtype rules, on a throwaway subclass that cuts itself down to the shard before it
is filled; nothing global is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from patchers.deci_x import BlockConfigs, as_described
from patchers.descriptor import ModelDescriptor
from patchers.errors import CheckpointError, MissingKeysError
from patchers.meta import ONE_AT_A_TIME
from patchers.names import fold
from sharded_ckpt.checkpoint.garbage import paused_collection
from sharded_ckpt.loading.misfits import Misfits
from sharded_ckpt.loading.plan import LoadPlan
from sharded_ckpt.model import create_local_shard_

_PLAIN_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


def cast_rule(wanted: Mapping[str, torch.dtype]) -> Callable[[str, torch.dtype], torch.dtype]:
    """Return the dtype that each tensor is to have, given the one it has in the file.

    Only plain floating-point numbers are ever cast. Integers stay what they are; quantised floats (fp8) are
    refused, since their scales would be lost.
    """

    def rule(key: str, found: torch.dtype) -> torch.dtype:
        asked = wanted.get(key, found)
        if asked == found or not asked.is_floating_point:
            return found
        if found not in _PLAIN_FLOATS:
            raise CheckpointError(
                f"{key} is {found} in the checkpoint, and the model wants {asked}: a quantised tensor is "
                "not cast blindly. Dequantise the checkpoint first"
            )
        return asked

    return rule


def check_castable(
    plan: LoadPlan, wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.dtype]
) -> None:
    """Make sure that transformers' loader, which casts whatever it is given, is given nothing quantised.

    Raises:
        CheckpointError: The model wants floating-point numbers, and the file has bare fp8 or integers.
    """
    for name, key in plan.sources.items():
        target = plan.target(name)
        if key in found and target in wanted:
            cast_rule({key: wanted[target].dtype})(key, found[key])


def check_shapes(
    plan: LoadPlan, wanted: Mapping[str, torch.Tensor], entries: Mapping[str, Any], files: Mapping[str, str]
) -> None:
    """Compare the shapes in the files' headers with those that the model wants, before anything is read.

    Raises:
        CheckpointError: They differ; it names key, file and both shapes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    wrong = [
        f"{key} in {files[key]} has shape {tuple(entries[key].shape)}, the model wants {shapes[name]}"
        for name, key in plan.sources.items()
        if tuple(entries[key].shape) != shapes[name]
    ]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CheckpointError(
            f"{len(wrong)} tensors do not fit the model: {'; '.join(wrong[:4])}{more}. The config may "
            "describe other blocks than the files hold: patchers.infer_block_configs reads the block "
            "configs off the tensor shapes"
        )


def fill_directly(model: PreTrainedModel, plan: LoadPlan, tensors: Mapping[str, torch.Tensor]) -> None:
    """Assign tensors to the shard's parameters and buffers, then tie what the plan ties.

    Args:
        model: A shard on meta.
        plan: Which key feeds what.
        tensors: By key, in their final dtype and on their final device.
    """
    with paused_collection():
        modules = dict(model.named_modules())
        for name, key in plan.sources.items():
            owner, _, attribute = name.rpartition(".")
            _assign(modules[owner], attribute, tensors[key])
    _tie(model, plan)


def fill_converted(
    descriptor: ModelDescriptor,
    config: PreTrainedConfig,
    block_configs: BlockConfigs | None,
    owned: set[int],
    state: Mapping[str, Any],
    options: dict[str, Any],
    misfits: Misfits,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Let transformers' own loader build and fill the shard.

    Args:
        descriptor: Of the family.
        config: Of the whole model.
        block_configs: In place of what the config says.
        owned: The blocks of the shard.
        state: The tensors that the shard needs, by checkpoint key.
        options: Further arguments of `from_pretrained`.
        misfits: Says what does not fit.

    Returns:
        The shard, and transformers' loading info.

    Raises:
        CheckpointError: Tensors do not fit the model.
        MissingKeysError: Tensors of the model are fed by nothing.
    """
    native = descriptor.model_class

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        native.__init__(self, config, *args, **kwargs)
        create_local_shard_(self, owned, descriptor)

    names = {"__init__": __init__, "__module__": native.__module__, "__qualname__": native.__qualname__}
    throwaway: type[PreTrainedModel] = type(native.__name__, (native,), names)
    with ONE_AT_A_TIME, as_described(descriptor, config, block_configs), _no_bar_of_transformers():
        try:
            loaded: Any = throwaway.from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused here, by name
                **options,
            )
        except RuntimeError as error:
            raise CheckpointError(misfits.unconverted(error)) from error
    model, info = loaded
    model.__class__ = native
    if info["mismatched_keys"]:
        raise CheckpointError(misfits.unlike(name for name, *_ in info["mismatched_keys"]))
    if info["missing_keys"]:
        raise MissingKeysError(misfits.missing(info["missing_keys"]))
    return model, info


@contextmanager
def _no_bar_of_transformers() -> Iterator[None]:
    """Keep transformers' own bar away: it counts tensors on every rank, ours counts bytes on one."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies), as transformers itself does."""
    modules = dict(model.named_modules())
    owners = {}
    for name, buffer in model.named_non_persistent_buffers():
        owner, _, attribute = name.rpartition(".")
        modules[owner]._buffers[attribute] = torch.empty_like(buffer, device=device)
        owners[owner] = modules[owner]
    with torch.no_grad():
        for module in owners.values():
            _initialise_unloaded(model, module)


def check_complete(made: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Make sure that nothing the shard owns was left without a value.

    Raises:
        CheckpointError: A parameter or buffer is on meta or on another device.
    """
    empty = [name for name, tensor in made.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(f"these were left without a value: {fold(empty)}; please report this")
    astray = [name for name, tensor in made.items() if tensor.device.type != device.type]
    if astray:
        raise CheckpointError(f"these are not on {device}: {fold(astray)}; please report this")


def _assign(module: nn.Module, attribute: str, tensor: torch.Tensor) -> None:
    if attribute in module._parameters:
        parameter = nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        module._parameters[attribute] = parameter
    else:
        module._buffers[attribute] = tensor


def _tie(model: PreTrainedModel, plan: LoadPlan) -> None:
    """Tie what the config calls tied, if the files agree; else keep both, as transformers does."""
    for target, source in plan.tied:
        kept = model.get_parameter(source)
        if plan.sources[target] == plan.sources[source] or torch.equal(model.get_parameter(target), kept):
            owner, _, attribute = target.rpartition(".")
            model.get_submodule(owner)._parameters[attribute] = kept
        else:
            model.all_tied_weights_keys.pop(target, None)


def _initialise_unloaded(model: PreTrainedModel, module: nn.Module) -> None:
    """Give a module's unloaded buffers their values; what was loaded carries a mark and is left alone."""
    model._init_weights(module)
