"""One rank's stage of a pipeline: the model over all ranks, called like the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from sharded_ckpt.pipeline.connected_stage import ConnectedStage
from sharded_ckpt.pipeline.forward import forward
from sharded_ckpt.pipeline.generation import generate
from sharded_ckpt.pipeline.inputs import MicroBatches
from sharded_ckpt.pipeline.scoring import ScoreResult, score
from sharded_ckpt.pipeline.training_step import LossFunction, clip_grad_norm_, train_step


class PipelineStage(ConnectedStage):
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

    def __call__(
        self,
        input_ids: torch.Tensor,
        *,
        broadcast: bool = False,
        micro_batches: MicroBatches = 1,
        **inputs: Any,
    ) -> Any:
        """Run the model, without gradients, on the same inputs on every rank.

        It returns when the last stage has done its work.

        Args:
            input_ids: `(batch, tokens)`.
            broadcast: Whether all ranks are to get the logits `(batch, tokens, vocabulary)`.
            micro_batches: Into how many parts the batch is cut so that all stages work at once, the number of
                rows of each, or "auto": the cut that is the fastest, by running parts of the batch first (one
                part where there is a cache or a loss).
            **inputs: What the model's forward takes besides (`attention_mask`, `position_ids`,
                its cache, …). A cache is this rank's own.

        Returns:
            The model's own output on the rank of the head, and with `broadcast` on the others; else None.

        Raises:
            ConfigError: The arguments cannot be right on any stage.
            CollectiveError: On all ranks: the inputs differ between ranks, or a rank failed or was lost.
        """
        given = {"input_ids": input_ids, **inputs}
        return forward(self, given, broadcast=broadcast, micro_batches=micro_batches)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        micro_batches: MicroBatches = 1,
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
        return generate(self, inputs, micro_batches, seed, options)

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
        micro_batches: MicroBatches = 1,
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
                takes. `labels` say which tokens count; by default all that `attention_mask` does not
                hide, nor the token before them: padding on the left changes nothing.
            micro_batches: Into how many parts each batch is cut, the rows of each, or "auto".
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
