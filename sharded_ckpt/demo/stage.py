"""A forward pass through all ranks, for the demo: one sequence, and each rank waits for the one before.

Every rank runs the model's own forward on the same `input_ids`; a hook before its first block replaces the
hidden states by those received, a hook after its last block sends them on. So masks and positions are the
model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from patchers.descriptor import ModelDescriptor
from patchers.errors import OwnershipError
from patchers.substitutes import armed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import Cache, PreTrainedModel

    from sharded_ckpt.runtime import Runtime


class Stage:
    """One rank's part of the forward pass of a model whose blocks are shared out in contiguous runs.

    Args:
        shard: As `load_and_shard_model` returns it. The hooks stay, so give it to no other stage.
        blocks: The blocks that it owns.
        runtime: The ranks; all make their stages together.

    Raises:
        OwnershipError: The blocks are not runs in the order of the ranks.
    """

    def __init__(self, shard: PreTrainedModel, blocks: Sequence[int], runtime: Runtime) -> None:
        self.shard, self._blocks, self._runtime = shard, blocks, runtime
        owned = runtime.control.gather(list(blocks), "lining up the ranks")
        in_order = [block for run in owned for block in run]
        if in_order != list(range(shard.config.num_hidden_layers)):
            raise OwnershipError(
                f"a pass through the ranks needs all {shard.config.num_hidden_layers} blocks in runs, in the "
                f"order of the ranks; the ranks own {owned}"
            )
        chain = [rank for rank, run in enumerate(owned) if run]
        self._head_rank = chain[-1]
        if self._blocks:
            self._hook(chain, chain.index(runtime.global_rank))

    def forward(self, input_ids: torch.Tensor, cache: Cache | None = None) -> torch.Tensor | None:
        """Run the model on the same `input_ids`, `(1, tokens)`, on every rank.

        Args:
            input_ids: The tokens; with a cache, those that are not in it yet.
            cache: This rank's own.

        Returns:
            Logits `(1, tokens, vocabulary)` on the rank that has the head, None on the others.
        """
        if not self._blocks:
            return None
        with torch.no_grad(), armed(self.shard):
            logits = self.shard(input_ids, past_key_values=cache, use_cache=cache is not None).logits
        return logits if self._runtime.global_rank == self._head_rank else None

    def share(self, token: torch.Tensor | None) -> torch.Tensor:
        """Return, on every rank, the token id `(1, 1)` that the rank with the head gives."""
        shared = torch.empty(1, 1, dtype=torch.int64) if token is None else token.contiguous()
        dist.broadcast(shared, group=self._runtime.process_group, group_src=self._head_rank)
        return shared

    def _hook(self, chain: list[int], position: int) -> None:
        descriptor = ModelDescriptor.of("auto", self.shard.config)
        first, last = (
            self.shard.get_submodule(descriptor.block_name(index))
            for index in (self._blocks[0], self._blocks[-1])
        )
        group = self._runtime.process_group
        if position > 0:
            first.register_forward_pre_hook(_receiver(chain[position - 1], group))
        if position < len(chain) - 1:
            last.register_forward_hook(_sender(chain[position + 1], group))


def _receiver(source: int, group: ProcessGroup | None) -> Any:
    def receive(block: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        zeros, *others = args
        hidden_states = torch.empty_like(zeros)
        dist.recv(hidden_states, group=group, group_src=source)
        return (hidden_states, *others)

    return receive


def _sender(target: int, group: ProcessGroup | None) -> Any:
    def send(block: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden_states = output if isinstance(output, torch.Tensor) else output[0]
        dist.send(hidden_states.contiguous(), group=group, group_dst=target)

    return send
