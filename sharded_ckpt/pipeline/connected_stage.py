"""One rank's blocks, connected to those of the other ranks: what everything that a stage does stands on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel

from patchers.descriptor import ModelDescriptor
from patchers.native import text_config_of
from sharded_ckpt.checkpoint.coordinator import together
from sharded_ckpt.collective.memberships import as_many_memberships, memberships
from sharded_ckpt.model import num_blocks
from sharded_ckpt.pipeline.body import Passed, Received, StageBody
from sharded_ckpt.pipeline.failure import failing_together
from sharded_ckpt.pipeline.inputs import fingerprint, require_runnable, require_token_ids
from sharded_ckpt.pipeline.lineup import Lineup, require_own_keys
from sharded_ckpt.pipeline.links import Links
from sharded_ckpt.pipeline.shared_parameters import SharedParameter, shared_parameters
from sharded_ckpt.runtime import as_runtime


class ConnectedStage:
    """This rank's blocks, and its connections to the other ranks. Making one is collective.

    Its arguments, attributes and errors are those of `PipelineStage`, which adds what is done with them.
    """

    def __init__(
        self,
        model_shard: PreTrainedModel,
        runtime: Any = None,
        *,
        descriptor: ModelDescriptor | str = "auto",
    ) -> None:
        self.shard, self.runtime = model_shard, as_runtime(runtime)
        control = self.runtime.control
        with together(control, "making the stages of a pipeline"):
            self.descriptor = ModelDescriptor.of(descriptor, model_shard.config)
            self.body = StageBody(model_shard, self.descriptor)
            described = [list(self.body.blocks), num_blocks(model_shard, self.descriptor), memberships()]
        told = control.gather(described, "lining up the stages of a pipeline")
        owned, counts, groups = zip(*told, strict=True)
        self.lineup = Lineup(tuple(map(tuple, owned)), max(counts))
        self.links: Links | None = None
        with together(control, "connecting the stages of a pipeline"):
            require_own_keys(self.lineup, text_config_of(model_shard.config))
            if self.runtime.world_size > 1:
                with as_many_memberships(max(groups)):
                    self.links = Links(self.lineup, self.runtime)

    def __repr__(self) -> str:
        rank, blocks = self.runtime.global_rank, self.lineup.owned[self.runtime.global_rank]
        return f"{type(self).__name__}(rank {rank} of {self.runtime.world_size}, blocks {blocks})"

    @property
    def is_first(self) -> bool:
        """Whether hidden states start here."""
        return bool(self.body.blocks) and self.body.blocks[0] == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the head."""
        return self.runtime.global_rank == self.lineup.head_rank

    @functools.cached_property
    def shared_parameters(self) -> tuple[SharedParameter, ...]:
        """The parameters of which several ranks hold copies; collective when it is first asked for."""
        return shared_parameters(self)

    def admit(self, inputs: Mapping[str, Any], *, extra: Any = None) -> dict[str, Any]:
        """Check that all ranks were given the same inputs, and move them here.

        Args:
            inputs: What the model's forward takes. `labels` stay on the rank of the head only.
            extra: What else must be the same on all ranks, as plain data.

        Raises:
            ConfigError: The arguments cannot be right on any stage.
            CollectiveError: The inputs differ between ranks.
        """
        require_token_ids(inputs.get("input_ids"))
        if self.links is not None:
            require_runnable(inputs, self.shard.config)
            self.links.compare(fingerprint(inputs, extra=extra))
        here = {name: _here(value, self.runtime.device) for name, value in inputs.items()}
        if not self.is_last:
            here.pop("labels", None)
        return here

    def expect(self, shape: Sequence[int]) -> None:
        """Ask the stage before for the hidden states of a pass, without waiting; they come in this order.

        Args:
            shape: Of the pass's `input_ids`.
        """
        if self.links is not None and self.links.before is not None:
            self.links.before.expect(tuple(shape))

    def expecting(self, shapes: Sequence[Sequence[int]], ahead: int = 2) -> Iterator[None]:
        """Yield before each of some passes, having asked for its hidden states and those of the next ones."""
        for shape in shapes[:ahead]:
            self.expect(shape)
        for index in range(len(shapes)):
            for shape in shapes[index + ahead : index + ahead + 1]:
                self.expect(shape)
            yield

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        head: bool = True,
        arriving: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Passed:
        """Run this stage once: take the hidden states that are expected next, run the blocks, send them on.

        Args:
            inputs: Of one micro-batch, admitted and cut, after `expect` or `expecting`.
            head: Whether the last stage is to compute its head, too.
            arriving: Given the hidden states that arrive, returns those to start from.
        """
        links = self.links
        received = links.before.take if links is not None and links.before is not None else None
        if received is not None and arriving is not None:
            received = _then(received, arriving)
        passed = self.body.run(inputs, received, head=head)
        if links is not None and links.after is not None:
            links.after.send(tuple(inputs["input_ids"].shape), passed.hidden_states)
        return passed

    def conclude(self) -> None:
        """Return when all ranks have done their work; until then one could still fail."""
        if self.links is not None:
            self.links.conclude()

    def collectively(self, doing: str) -> AbstractContextManager[None]:
        """Return a context in which an error of one rank becomes one of all, which names that rank.

        Args:
            doing: What is being done, in the same words on all ranks.
        """
        return failing_together(self.runtime, self.links, doing)


def _then(received: Received, arriving: Callable[[torch.Tensor], torch.Tensor]) -> Received:
    return lambda: arriving(received())


def _here(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
