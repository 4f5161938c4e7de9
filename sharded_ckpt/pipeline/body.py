"""One rank's part of a forward pass, without any communication: hidden states in, hidden states out.

The model's own forward runs on the same `input_ids` on every rank, so masks, rotary embeddings and positions
are the model's own, computed locally; only hidden states have to travel. The stub before the first owned
block returns those that were received, and those that leave the last owned block are taken down. The stubs
behind it, of the final norm and the head too, pass everything on, so their work is the last rank's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from patchers.descriptor import ModelDescriptor
from patchers.errors import PartialModelError
from patchers.substitutes import Unowned, UnownedBlock, all_armed

Received = Callable[[], torch.Tensor]
"""Gives the hidden states that this rank's first block is to start from; asked when they are needed."""


@dataclass(frozen=True)
class Passed:
    """What came of one pass.

    Attributes:
        hidden_states: What the last owned block returned; with gradients on, with its graph.
        output: The model's own output. Its logits mean something on the rank of the head alone.
    """

    hidden_states: torch.Tensor
    output: Any


class StageBody:
    """The owned blocks of a shard, run by the model's own forward.

    Args:
        shard: As `load_and_shard_model` returns it.
        descriptor: A `ModelDescriptor`, the name of a family, or `"auto"`.

    Attributes:
        shard: The model.
        blocks: The blocks that it owns, in order.
    """

    def __init__(self, shard: PreTrainedModel, descriptor: ModelDescriptor | str = "auto") -> None:
        described = ModelDescriptor.of(descriptor, shard.config)
        layers = list(shard.get_submodule(described.layers).children())
        self.shard = shard
        self.blocks = tuple(
            index for index, block in enumerate(layers) if not isinstance(block, UnownedBlock)
        )
        self._owned = [layers[index] for index in self.blocks]
        self._before = layers[self.blocks[0] - 1] if self.blocks and self.blocks[0] else None
        self._head = shard.get_submodule(described.head) if described.head else None
        self._stubs = [module for module in shard.modules() if isinstance(module, Unowned)]

    def run(
        self, inputs: Mapping[str, Any], received: Received | None = None, *, head: bool = True
    ) -> Passed:
        """Run the owned blocks, with gradients if they are on.

        Args:
            inputs: What the model's forward takes: `input_ids` and the like, the same on every rank, and this
                rank's own cache.
            received: The hidden states from the rank before, for all ranks but the first.
            head: Whether the head is needed; without it the logits are rubbish.

        Raises:
            PartialModelError: Hidden states came in that do not fit, or are changed after they left.
        """
        left: list[tuple[torch.Tensor, int]] = []
        with ExitStack() as stack:
            stack.enter_context(all_armed(self._stubs))
            stack.enter_context(_taking_down(self._owned[-1], left))
            if isinstance(self._before, UnownedBlock) and received is not None:
                stack.enter_context(_delivering(self._before, received))
            if self._head is not None and not head:
                stack.enter_context(_passing_on(self._head))
            output = self.shard(**inputs)
        self._require_one_turn(len(left))
        hidden_states, version = left[0]
        if _version(hidden_states) != version:
            raise PartialModelError(
                f"{type(self.shard).__name__} changes hidden states in place after its blocks, so they "
                "cannot be sent to another rank"
            )
        return Passed(hidden_states, output)

    def pass_by(self, inputs: Mapping[str, Any]) -> None:
        """Let a cache count the tokens of a pass in which this rank, which owns nothing, takes no part.

        Args:
            inputs: As for `run`.
        """
        with all_armed(self._stubs):
            self.shard(**inputs)

    def _require_one_turn(self, turns: int) -> None:
        """Refuse to end among blocks that are run again (dory): what was sent is of one turn."""
        if turns != 1 and len(self._stubs) > 0:
            raise PartialModelError(
                f"{type(self.shard).__name__} runs its block {self.blocks[-1]} {turns} times in one pass, so "
                "no rank can end there: let one rank own all blocks that are run repeatedly"
            )


@contextmanager
def _delivering(stub: UnownedBlock, received: Received) -> Iterator[None]:
    def deliver(placeholder: torch.Tensor) -> torch.Tensor:
        hidden_states = received()
        if hidden_states.shape != placeholder.shape:
            raise PartialModelError(
                f"hidden states {list(hidden_states.shape)} came for the block after {stub.name}, which "
                f"expects {list(placeholder.shape)}: the ranks run different inputs or different models"
            )
        return hidden_states

    stub.delivery = deliver
    try:
        yield
    finally:
        stub.delivery = None


@contextmanager
def _taking_down(block: nn.Module, left: list[tuple[torch.Tensor, int]]) -> Iterator[None]:
    def take_down(_: nn.Module, args: Any, output: Any) -> None:
        hidden_states = output if isinstance(output, torch.Tensor) else output[0]
        left.append((hidden_states, _version(hidden_states)))

    hook = block.register_forward_hook(take_down)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _passing_on(head: nn.Module) -> Iterator[None]:
    """Let a head return what it is given: cheaper than an exception, and kind to what runs after it."""

    def pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    before = vars(head).get("forward")  # accelerate's, where the head is brought from elsewhere
    vars(head)["forward"] = pass_on
    try:
        yield
    finally:
        del vars(head)["forward"]
        if before is not None:
            vars(head)["forward"] = before


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
