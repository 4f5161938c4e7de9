"""How much each FFN channel and each KV head adds to the residual stream, measured while a model runs.

The score of a channel is the root mean square, over tokens, of the norm of what it adds: its activation times
its column of the down projection. That of a KV head is the same for the outputs of its query heads times
their columns of the output projection. (The independent contributions by which NVIDIA Model-Optimizer ranks
channels and KV heads, Puzzletron's pruning hooks; means of squares in place of means.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from patchers.descriptor import ModelDescriptor
from patchers.errors import ConfigError
from patchers.substitutes import Removed
from patchers.tensor_roles import role_of

FFN_CHANNELS, KV_HEADS = "ffn_channels", "kv_heads"
"""What is measured, as `init_child_from_parent` calls its arguments."""


class ActivationStatistics:
    """Sums over tokens, block by block.

    Args:
        model: The model or shard.
        descriptor: Where its family keeps its parts.
        blocks: Which blocks to watch: those that this rank owns.
        sums: Where to add up, by `"ffn_channels.<block>"` and `"kv_heads.<block>"`, in fp64: the squared norm
            of each unit, summed over tokens, and the number of tokens behind them.

    Raises:
        ConfigError: A block has an FFN or an attention of another kind than can be measured.
    """

    def __init__(
        self,
        model: nn.Module,
        descriptor: ModelDescriptor,
        blocks: Iterable[int],
        sums: MutableMapping[str, Tensor],
    ) -> None:
        self._sums = sums
        self._watched: list[tuple[nn.Module, str, Callable[[Tensor], Tensor]]] = []
        self._counts: Tensor | None = None
        for index in blocks:
            block = model.get_submodule(descriptor.block_name(index))
            if any(parameter.is_meta for parameter in block.parameters()):
                raise ConfigError(f"block {index} is offloaded, so its activations cannot be measured")
            self._watch_ffn(block, descriptor, index)
            self._watch_attention(block, descriptor, index)

    @contextmanager
    def counting(self, attention_mask: Tensor | None) -> Iterator[None]:
        """Add up what runs inside.

        Args:
            attention_mask: `(batch, tokens)`, 0 for tokens that do not count; None if all do.
        """
        self._counts = attention_mask
        with ExitStack() as stack:
            for module, key, squares in self._watched:
                stack.enter_context(module.register_forward_pre_hook(self._adding(key, squares)))
            yield

    def _adding(self, key: str, squares: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            found = squares(args[0].detach()).double()  # (batch, tokens, units)
            counts = found.new_ones(found.shape[:2]) if self._counts is None else self._counts.to(found)
            total = (found * counts[..., None]).sum(dim=(0, 1))
            add_up(self._sums, key, torch.cat([total, counts.sum()[None]]))

        return add

    def _watch_ffn(self, block: nn.Module, descriptor: ModelDescriptor, index: int) -> None:
        name = None if descriptor.ffn is None else descriptor.ffn.name
        ffn = None if name is None else block.get_submodule(name)
        if isinstance(ffn, Removed):
            return
        down = None if ffn is None else _projection(ffn, f"{name}", "ffn", "down")
        if down is None:
            raise ConfigError(
                f"block {index} has no down projection of a dense FFN, so its channels cannot be measured"
            )
        norms = down.weight.detach().float().square().sum(0)
        self._watched.append((down, f"{FFN_CHANNELS}.{index}", lambda x: x.float().square() * norms))

    def _watch_attention(self, block: nn.Module, descriptor: ModelDescriptor, index: int) -> None:
        name = None if descriptor.attention is None else descriptor.attention.name
        attention = None if name is None else block.get_submodule(name)
        if isinstance(attention, Removed):
            return
        key, out = (
            None if attention is None else _projection(attention, f"{name}", "attention", projection)
            for projection in ("k", "o")
        )
        head_dim = getattr(attention, "head_dim", None)
        if key is None or out is None or head_dim is None:
            raise ConfigError(
                f"block {index} has no key and output projections of heads, so its KV heads cannot be "
                "measured"
            )
        heads = key.out_features // head_dim
        weights = out.weight.detach().float().chunk(heads, dim=1)

        def squares(x: Tensor) -> Tensor:
            groups = zip(x.float().chunk(heads, dim=-1), weights, strict=True)
            return torch.stack([(group @ weight.T).square().sum(-1) for group, weight in groups], dim=-1)

        self._watched.append((out, f"{KV_HEADS}.{index}", squares))


def add_up(sums: MutableMapping[str, Tensor], key: str, added: Tensor) -> None:
    """Add to a sum, which is kept on the CPU, wherever the model runs."""
    added = added.detach().double().cpu()
    sums[key] = sums[key] + added if key in sums else added


def _projection(part: nn.Module, name: str, of: str, projection: str) -> nn.Linear | None:
    for path, module in part.named_modules(prefix=name):
        role = role_of(f"{path}.weight")
        told = None if role is None else (role.part, role.projection)
        if isinstance(module, nn.Linear) and told == (of, projection):
            return module
    return None
