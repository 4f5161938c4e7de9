"""One rank's stage of a pipeline: the model over all ranks, called like the model."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from patchers.descriptor import ModelDescriptor
from sharded_ckpt.checkpoint.coordinator import together
from sharded_ckpt.pipeline.body import Passed, Received, StageBody
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
from sharded_ckpt.pipeline.scoring import ScoreResult, score
from sharded_ckpt.pipeline.shared_parameters import SharedParameter, shared_parameters
from sharded_ckpt.pipeline.training_step import LossFunction, clip_grad_norm_, train_step
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
        descriptor: Where its family keeps its parts.
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
            self.descriptor = ModelDescriptor.of(descriptor, model_shard.config)
            self.body = StageBody(model_shard, self.descriptor)
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
            shapes = [part["input_ids"].shape for part in parts]
            passes = zip(parts, self.expecting(shapes), strict=True)
            outputs = [self.run(part).output for part, _ in passes if self.body.blocks]
            result = joined(outputs) if self.is_last else None
            if broadcast and self.links is not None:
                result = self._broadcast(result, self.links, inputs.get("labels") is not None)
            self.conclude()
        return result

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        micro_batches: int | Sequence[int] | Literal["auto"] = 1,
        seed: int | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Continue prompts, greedily or by sampling, as transformers' `generate` does in one process.

        The last stage chooses the tokens, with transformers' own logits processors and stopping criteria.

        Args:
            inputs: `input_ids` `(batch, tokens)`; shorter prompts are padded on the left. By that name, too:
                `generate(**tokenizer(text, return_tensors="pt"))`.
            micro_batches: Into how many parts the batch is cut so that all stages work at once, the number of
                rows of each, or "auto": the cut whose steps are the fastest, by measuring some first.
            seed: For sampling; by default the last rank's default generator goes on.
            **options: What transformers' `generate` takes: `generation_config` or its fields
                (`max_new_tokens`, `do_sample`, `temperature`, `prefill_chunk_size`, …), `attention_mask`,
                `logits_processor`, `stopping_criteria`, `stop_strings` with `tokenizer`, and `streamer`, on
                any rank.

        Returns:
            The prompts and what follows, `(batch, tokens)`, the same on every rank.

        Raises:
            ConfigError: Something other than token ids, or another way of generating, was asked for.
            CollectiveError: On all ranks: the inputs differ between ranks, or a rank failed or was lost.
        """
        from sharded_ckpt.pipeline.generation import generate

        with self.collectively("generating"), torch.no_grad():
            if self.links is not None:
                require_runnable(options, self.shard.config)
                told = {name: value for name, value in options.items() if name != "streamer"}
                self.links.compare(fingerprint({"input_ids": inputs, **told}, extra=[micro_batches, seed]))
            made = generate(self, inputs, micro_batches, seed, options)
            self.conclude()
        return made

    def train_step(
        self,
        batch: Mapping[str, Any],
        loss_fn: LossFunction | None = None,
        *,
        micro_batches: int | Sequence[int] = 1,
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor:
        """Run forward and backward: every rank's parameters get the gradients that they get in one process.

        Gradients add up from call to call, as with `backward()`, until the optimizer's `zero_grad`. Each rank
        has an optimizer of its own, of its shard's parameters. Copies of a parameter on several ranks (the
        ends of a tied model) get the same gradient, so with the same optimizer they stay equal. Frozen
        parameters, `train()` and transformers' gradient checkpointing work as in one process; dropout draws
        other numbers.

        Args:
            batch: `input_ids` `(batch, tokens)` and what else the model's forward takes, the same on every
                rank. `labels` and what the forward does not take are for the loss; they count on the rank of
                the head.
            loss_fn: `loss_fn(outputs, micro_batch, num_items_in_batch)` returns what a micro-batch adds to
                the loss: a sum over its items, divided by their number in the whole batch. By default the
                model's own loss, the mean over all tokens with a label.
            micro_batches: Into how many parts the batch is cut, or the rows of each.
            num_items_in_batch: What the loss is divided by; by default the labels that count in this batch.
                Where the gradients of several calls add up to one step, their number in all of them.

        Returns:
            The loss of the batch, on every rank.

        Raises:
            ConfigError: There are no labels and no `loss_fn`, or nothing is trained.
            CollectiveError: On all ranks: the inputs differ between ranks, or a rank failed or was lost.

        Example:
            >>> from sharded_ckpt import load_and_shard_model
            >>> stage = PipelineStage(load_and_shard_model("auto", checkpoint, materialize=True))
            >>> optimizer = torch.optim.AdamW(stage.shard.parameters(), lr=1e-4)
            >>> ids = torch.tensor([[1, 5, 7, 9], [1, 6, 8, 9]])
            >>> loss = stage.train_step({"input_ids": ids, "labels": ids}, micro_batches=2)
            >>> norm = stage.clip_grad_norm_(1.0)
            >>> optimizer.step()
        """
        return train_step(
            self, batch, loss_fn, micro_batches=micro_batches, num_items_in_batch=num_items_in_batch
        )

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale the gradients of all ranks down to a norm, as `torch.nn.utils.clip_grad_norm_` does in one.

        Args:
            max_norm: The most that the norm over all ranks may be; `math.inf` only measures.
            norm_type: Which norm; `math.inf` for that of the largest element.

        Returns:
            The norm as it was, on every rank; a parameter of which several ranks hold copies counts once.
        """
        return clip_grad_norm_(self, max_norm, norm_type)

    def score(
        self,
        dataset: Iterable[Mapping[str, Any]],
        *,
        micro_batches: int | Sequence[int] = 1,
        teacher: PipelineStage | None = None,
        activations: bool = False,
        resume_dir: str | os.PathLike[str] | None = None,
        save_every: int = 64,
        progress: bool | Callable[[int], object] | None = None,
    ) -> ScoreResult:
        """Run a dataset through the model, and return its loss and the log-probability of every token.

        Batches follow each other without waiting for the last stage.

        Args:
            dataset: Batches, the same on every rank: `input_ids` `(batch, tokens)` and what else the forward
                takes. `labels` say which tokens count; by default all that `attention_mask` does not hide.
            micro_batches: Into how many parts each batch is cut, or the rows of each.
            teacher: The stage of another model with the same blocks on the same ranks, to compare with:
                divergence of the next token, and cosines of the hidden states after each block.
            activations: Whether to measure how much each FFN channel and each KV head adds to the residual
                stream: what `init_child_from_parent` takes as `ffn_channels` and `kv_heads`.
            resume_dir: Where to save what was added up, on a file system that all ranks share; a later call
                with the same dataset goes on from there, on any number of ranks.
            save_every: After how many batches to save.
            progress: Whether to show a bar of the batches; by default on the main rank of a terminal. Or a
                function that is told each number of batches.

        Raises:
            ConfigError: The dataset is empty or another one than was scored before, the teacher's blocks are
                elsewhere, or there is nothing of the kind that is to be measured.
            CheckpointError: In `resume_dir` another model was scored.
            CollectiveError: On all ranks: the inputs differ between ranks, or a rank failed or was lost.

        Example:
            >>> from sharded_ckpt import load_and_shard_model
            >>> stage = PipelineStage(load_and_shard_model("auto", checkpoint))
            >>> result = stage.score([{"input_ids": torch.tensor([[1, 5, 7, 9]])}], activations=True)
            >>> result.tokens, len(result.log_probs[0]), len(result.ffn_channels[0].values)
            (3, 3, 96)
        """
        return score(
            self,
            dataset,
            micro_batches=micro_batches,
            teacher=teacher,
            activations=activations,
            resume_dir=resume_dir,
            save_every=save_every,
            progress=progress,
        )

    @functools.cached_property
    def shared_parameters(self) -> tuple[SharedParameter, ...]:
        """The parameters of which several ranks hold copies; collective when it is first asked for."""
        return shared_parameters(self)

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
            inputs: Of one micro-batch, as `prepared` gives them, after `expect` or `expecting`.
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

    def _broadcast(self, output: Any, links: Links, has_loss: bool) -> Any:
        """Return, on every rank, an output like that of the last stage, with its logits and its loss."""
        names = ["logits", "loss"] if has_loss else ["logits"]
        told = links.share(None if output is None else [output[name] for name in names], len(names))
        if output is not None:
            return output
        return CausalLMOutputWithPast(logits=told[0], loss=told[1] if has_loss else None)


def _then(received: Received, arriving: Callable[[torch.Tensor], torch.Tensor]) -> Received:
    return lambda: arriving(received())


def _here(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
