"""One rank's stage of a pipeline: the model over all ranks, called like the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from patchers.descriptor import ModelDescriptor
from sharded_ckpt.checkpoint.coordinator import together
from sharded_ckpt.pipeline.body import Passed, StageBody
from sharded_ckpt.pipeline.failure import failing_together
from sharded_ckpt.pipeline.inputs import (
    cut,
    fingerprint,
    joined,
    require_runnable,
    require_separable,
    sizes_of,
)
from sharded_ckpt.pipeline.lineup import Lineup, require_own_keys
from sharded_ckpt.pipeline.links import Links
from sharded_ckpt.runtime import as_runtime


class PipelineStage:
    """This rank's stage of a pipeline over all ranks, each of which makes one out of its shard.

    Every method is to be called on every rank with the same arguments; only hidden states travel from rank
    to rank, and token ids back. Where a rank fails, dies or stays silent, all others raise an error that
    names it.

    Args:
        model_shard: As `load_and_shard_model` returns it. All ranks together own every block once, in
            contiguous runs in the order of the ranks; some may own nothing.
        runtime: The ranks; None for those of torch.distributed.
        descriptor: A `ModelDescriptor`, the name of a family, or `"auto"`.

    Attributes:
        shard: The model.
        body: Runs this rank's blocks on hidden states, without communication.
        lineup: Which rank runs which blocks.
        links: The connections to the other ranks; None for a single stage.
        runtime: The ranks.

    Raises:
        OwnershipError: The blocks are not in contiguous runs in the order of the ranks.
        FamilyError: A block reads what a block of another rank has computed, besides the hidden states.

    Example:
        >>> from sharded_ckpt import load_and_shard_model
        >>> stage = PipelineStage(load_and_shard_model("auto", checkpoint))  # the path of a checkpoint
        >>> stage(torch.tensor([[1, 5, 7]])).logits.shape
        torch.Size([1, 3, 128])
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
            self.body = StageBody(model_shard, descriptor)
            described = [list(self.body.blocks), model_shard.config.num_hidden_layers]
        told = control.gather(described, "lining up the stages of a pipeline")
        self.lineup = Lineup(tuple(tuple(owned) for owned, _ in told), max(count for _, count in told))
        self.links: Links | None = None
        with together(control, "connecting the stages of a pipeline"):
            require_own_keys(self.lineup, model_shard.config)
            if self.runtime.world_size > 1:
                self.links = Links(self.lineup, self.runtime)

    def __repr__(self) -> str:
        blocks = self.lineup.owned[self.runtime.global_rank]
        return f"PipelineStage(rank {self.runtime.global_rank} of {self.runtime.world_size}, blocks {blocks})"

    @property
    def is_first(self) -> bool:
        """Whether hidden states start here."""
        return bool(self.body.blocks) and self.body.blocks[0] == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the head."""
        return self.runtime.global_rank == self.lineup.head_rank

    def __call__(
        self,
        input_ids: torch.Tensor,
        *,
        broadcast: bool = False,
        micro_batches: int | Sequence[int] = 1,
        **inputs: Any,
    ) -> Any:
        """Run the model, without gradients, on the same inputs on every rank.

        It returns when the last stage has done its work.

        Args:
            input_ids: `(batch, tokens)`.
            broadcast: Whether all ranks are to get the logits `(batch, tokens, vocabulary)`.
            micro_batches: Into how many parts the batch is cut so that all stages work at once, or the number
                of rows of each.
            **inputs: What the model's forward takes besides (`attention_mask`, `position_ids`,
                `past_key_values`, …). A cache is this rank's own.

        Returns:
            The model's own output on the rank of the head, and with `broadcast` on the others; else None.

        Raises:
            ConfigError: The arguments cannot be right on any stage.
            CollectiveError: On all ranks: the inputs differ between ranks, or a rank failed or was lost.
        """
        given = {"input_ids": input_ids, **inputs}
        with self.collectively("running the pipeline"), torch.no_grad():
            parts = self.prepared(given, micro_batches, extra=broadcast)
            outputs = [self.run(part).output for part in self.expected(parts)]
            result = joined(outputs) if self.is_last else None
            if broadcast and self.links is not None:
                result = self._broadcast(result, self.links, inputs.get("labels") is not None)
            self.conclude()
        return result

    def prepared(
        self, inputs: Mapping[str, Any], micro_batches: int | Sequence[int] = 1, *, extra: Any = None
    ) -> list[dict[str, Any]]:
        """Check that all ranks were given the same inputs, move them here, and cut them into micro-batches.

        Args:
            inputs: What the model's forward takes. `labels` stay on the rank of the head only.
            micro_batches: How many, or the rows of each.
            extra: What else must be the same on all ranks, as plain data.

        Raises:
            ConfigError: The arguments cannot be right on any stage.
            CollectiveError: The inputs differ between ranks.
        """
        if self.links is not None:
            require_runnable(inputs, self.shard.config)
        sizes = sizes_of(micro_batches, inputs["input_ids"].shape[0])
        require_separable(inputs, len(sizes))
        if self.links is not None:
            self.links.compare(fingerprint(inputs, extra=[sizes, extra]))
        here = {name: _here(value, self.runtime.device) for name, value in inputs.items()}
        if not self.is_last:
            here.pop("labels", None)
        return list(cut(here, sizes))

    def expected(self, parts: Iterable[dict[str, Any]], ahead: int = 2) -> Iterator[dict[str, Any]]:
        """Yield what is to be run, having asked for the hidden states of the next few passes, too.

        A rank that owns nothing gets nothing.
        """
        if not self.body.blocks:
            return
        waiting: deque[dict[str, Any]] = deque()
        for part in parts:
            if self.links is not None and self.links.before is not None:
                self.links.before.expect(tuple(part["input_ids"].shape))
            waiting.append(part)
            if len(waiting) > ahead:
                yield waiting.popleft()
        yield from waiting

    def run(self, inputs: Mapping[str, Any], *, head: bool = True) -> Passed:
        """Run this stage once: take the hidden states that are expected next, run the blocks, send them on.

        Args:
            inputs: Of one micro-batch, as `prepared` and `expected` give them.
            head: Whether the last stage is to compute its head, too.
        """
        links = self.links
        received = links.before.take if links is not None and links.before is not None else None
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

    def _broadcast(self, output: Any, links: Links, has_loss: bool) -> Any:
        """Return, on every rank, an output like that of the last stage, with its logits and its loss."""
        names = ["logits", "loss"] if has_loss else ["logits"]
        told = links.share(None if output is None else [output[name] for name in names], len(names))
        if output is not None:
            return output
        return CausalLMOutputWithPast(logits=told[0], loss=told[1] if has_loss else None)


def _here(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
