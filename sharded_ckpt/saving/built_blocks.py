"""Whether a config builds the shard that is to be saved: names and shapes, in any family."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from patchers.deci_x import BlockConfigs, blocks_of
from patchers.descriptor import ModelDescriptor
from patchers.errors import BlockConfigError
from patchers.families import PLAIN_FAMILIES
from patchers.substitutes import Unowned
from sharded_ckpt.model import build_skeleton

_SHOWN = 4

Shapes = dict[str, tuple[int, ...]]


def check_built(
    model: PreTrainedModel, config: PreTrainedConfig, block_configs: BlockConfigs | None = None
) -> None:
    """Make sure that a config which says how its blocks differ builds the blocks of a shard.

    Plain families are passed by: their tensors tell by their names what they are (`check_blocks`).

    Args:
        model: The shard.
        config: That is to be saved with it.
        block_configs: In place of what the config says.

    Raises:
        BlockConfigError: Names or shapes of the blocks' tensors differ; it names them.
        FamilyError: The family cannot have such blocks.
    """
    if config.model_type in PLAIN_FAMILIES or blocks_of(config, block_configs) is None:
        return
    descriptor = ModelDescriptor.from_config(config, type(model))
    skeleton = build_skeleton(descriptor, config, block_configs=block_configs)
    said, found = _shapes(skeleton, descriptor), _shapes(model, descriptor)
    owned = {name: shape for name, shape in said.items() if not _is_elsewhere(model, descriptor, name)}
    if owned == found:
        return
    wrong = [
        f"{name} is {found.get(name, 'not there')}, the config says {owned.get(name, 'that it is not there')}"
        for name in {**owned, **found}
        if owned.get(name) != found.get(name)
    ]
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    raise BlockConfigError(
        f"the config does not describe the model: {'; '.join(wrong[:_SHOWN])}{more}. Nothing was saved. Pass "
        f"block_configs=… to say what the blocks are"
    )


def _shapes(model: PreTrainedModel, descriptor: ModelDescriptor) -> Shapes:
    """Return the shapes of all tensors of the blocks, by name."""
    stack = f"{descriptor.layers}."
    tensors = model.state_dict(keep_vars=True)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(stack)}


def _is_elsewhere(model: PreTrainedModel, descriptor: ModelDescriptor, name: str) -> bool:
    index = name.removeprefix(f"{descriptor.layers}.").partition(".")[0]
    return isinstance(model.get_submodule(f"{descriptor.layers}.{index}"), Unowned)
