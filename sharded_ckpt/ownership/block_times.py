"""How long each block takes on this machine: measured, one block of each kind."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from patchers.cache_names import cache_name, cache_of
from patchers.deci_x import BlockConfigs
from patchers.descriptor import ModelDescriptor
from patchers.errors import ConfigError
from patchers.substitutes import armed
from sharded_ckpt.model import build_skeleton, create_sharded_model
from sharded_ckpt.ownership.costs import ModelCosts
from sharded_ckpt.runtime import as_runtime

_WARM_UP = 2  # passes that are not counted


def measure_block_times(
    config: PreTrainedConfig,
    *,
    batch: int = 1,
    length: int = 512,
    past: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    repeats: int = 7,
    descriptor: ModelDescriptor | str = "auto",
    block_configs: BlockConfigs | None = None,
) -> ModelCosts:
    """Measure the seconds that each block takes for a forward pass on this machine.

    Blocks that are built alike are measured once, and one at a time, with random weights: so a model is
    measured that fits into no single device. The numbers are medians; what else runs on the machine shows.

    Args:
        config: The config of the whole model.
        batch: Sequences.
        length: Tokens of each that the pass computes: 1 for a step of decoding.
        past: Tokens of each that are in the cache before.
        device: Where to measure; by default where the default runtime is.
        dtype: Of the weights; by default the config's.
        repeats: Passes of which the median is taken.
        descriptor: A `ModelDescriptor`, the name of a family, or `"auto"`.
        block_configs: One entry a block, in place of what the config says.

    Returns:
        Costs in seconds, for `plan_ownership`; final norm and head count for all `length` tokens.

    Raises:
        ConfigError: There is nothing to measure: no token, no sequence or no repeat.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
        >>> times = measure_block_times(config, length=8)
        >>> times.by, len(times.blocks), len(set(times.blocks))  # all four are alike
        ('seconds', 4, 1)
    """
    for name, number in {"batch": batch, "length": length, "repeats": repeats}.items():
        if number < 1:
            raise ConfigError(f"{name} is {number}; there is nothing to measure")
    descriptor = ModelDescriptor.of(descriptor, config)
    where = torch.device(device) if device is not None else as_runtime().device
    kinds = _kinds(build_skeleton(descriptor, config, dtype, block_configs), descriptor)
    measured = {kind: index for index, kind in reversed(list(enumerate(kinds)))}  # the first of each kind
    names = {index: [descriptor.block_name(index)] for index in measured.values()}
    names[0].append(descriptor.embedding)
    ends = [name for name in (descriptor.final_norm, descriptor.head) if name is not None]
    names.setdefault(len(kinds) - 1, []).extend(ends)
    seconds: dict[str, float] = {}
    for index, timed in names.items():
        model = create_sharded_model(
            None, descriptor, config, {index}, where, dtype, block_configs=block_configs
        )
        block = model.get_submodule(descriptor.block_name(index))
        with block.register_forward_pre_hook(_with_noise, with_kwargs=True):
            seconds |= _medians(model, timed, _Pass(where, batch, length, past), repeats)
    blocks = tuple(seconds[descriptor.block_name(measured[kind])] for kind in kinds)
    head = sum(seconds[name] for name in ends)
    return ModelCosts(blocks, seconds[descriptor.embedding], head, by="seconds")


@dataclass(frozen=True)
class _Pass:
    """What goes through the model when it is measured."""

    device: torch.device
    batch: int
    length: int
    past: int

    def tokens(self, number: int) -> torch.Tensor:
        return torch.zeros(self.batch, number, dtype=torch.int64, device=self.device)


def _kinds(skeleton: PreTrainedModel, descriptor: ModelDescriptor) -> list[Hashable]:
    """Describe each block, such that blocks which run alike have the same description."""
    return [_kind(block) for block in skeleton.get_submodule(descriptor.layers).children()]


def _kind(block: nn.Module) -> Hashable:
    return tuple(
        (
            name,
            type(module),
            tuple(tuple(parameter.shape) for parameter in module.parameters(recurse=False)),
            tuple(sorted((k, v) for k, v in vars(module).items() if _tells_how_it_runs(k, v))),
        )
        for name, module in block.named_modules()
    )


def _tells_how_it_runs(name: str, value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and name != "layer_idx"


def _with_noise(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Replace the hidden states: zeros, as the stub of an embedding gives, would all go to one expert."""
    if args:
        return (torch.randn_like(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": torch.randn_like(kwargs["hidden_states"])}


def _medians(model: PreTrainedModel, names: list[str], what: _Pass, repeats: int) -> dict[str, float]:
    clocks = {name: _Clock(what.device) for name in names}
    cache = None
    with torch.no_grad(), armed(model):
        if what.past:
            cache = cache_of(model(what.tokens(what.past), use_cache=True))
        for name, clock in clocks.items():
            clock.watch(model.get_submodule(name))
        for _ in range(_WARM_UP + repeats):
            past = {} if cache is None else {str(cache_name(model.forward)): copy.deepcopy(cache)}
            model(what.tokens(what.length), use_cache=bool(what.past), **past)
    return {name: statistics.median(clock.seconds[_WARM_UP:]) for name, clock in clocks.items()}


class _Clock:
    """Takes the time of each call of a module."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: list[float] = []

    def watch(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._began = self._now()

    def _stop(self, *_: Any) -> None:
        self.seconds.append(self._now() - self._began)

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()
