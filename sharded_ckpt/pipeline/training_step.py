"""A training step over the stages: forward and backward in turns; gradients of hidden states travel back."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import TransformersKwargs

from patchers.errors import ConfigError
from sharded_ckpt.pipeline.inputs import cut, sizes_of
from sharded_ckpt.pipeline.one_f_one_b import one_forward_one_backward
from sharded_ckpt.pipeline.shared_parameters import SharedParameter, require_here, sum_gradients

if TYPE_CHECKING:
    from sharded_ckpt.pipeline.connected_stage import ConnectedStage
    from sharded_ckpt.pipeline.wire import Arrival

LossFunction = Callable[..., torch.Tensor]
"""`loss_fn(outputs, micro_batch, num_items_in_batch) -> scalar`; those of the micro-batches add up."""

_IGNORED = -100  # transformers' label of tokens that do not count
_MASKS_BY_LABELS = ("paligemma",)


def train_step(
    stage: ConnectedStage,
    batch: Mapping[str, Any],
    loss_fn: LossFunction | None = None,
    *,
    micro_batches: int | Sequence[int] = 1,
    num_items_in_batch: int | None = None,
) -> torch.Tensor:
    """Run forward and backward over all stages. See `PipelineStage.train_step`."""
    with stage.collectively("a training step"), torch.enable_grad():
        shared = stage.shared_parameters  # the ranks meet for it, so before any of them can fail alone
        require_here(stage.shard)
        inputs, others = separated(stage.shard, batch)
        here = stage.admit({**inputs, "use_cache": False}, extra=micro_batches)
        sizes = sizes_of(micro_batches, here["input_ids"].shape[0])
        parts = list(cut(here, sizes))
        with _set_aside(shared):
            passes = _Passes(stage, _Loss(stage, loss_fn, others, num_items_in_batch))
            losses = passes.run(parts, list(_cut_for_loss(others, batch["input_ids"], sizes)))
            if stage.links is not None:
                sum_gradients(shared, stage.runtime.global_rank, stage.links)
        loss = [torch.stack(losses).sum()] if losses else None
        if stage.links is not None:
            loss = stage.links.share(loss, 1)
        stage.conclude()
    return loss[0] if loss else torch.zeros(())


def clip_grad_norm_(stage: ConnectedStage, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """Clip by the norm over all ranks. See `PipelineStage.clip_grad_norm_`."""
    rank = stage.runtime.global_rank
    elsewhere = {id(p.local) for p in stage.shared_parameters if p.ranks[0] != rank}
    parameters = [p for p in stage.shard.parameters() if p.grad is not None]
    counted = [p.grad for p in parameters if p.grad is not None and id(p) not in elsewhere]
    norm = nn.utils.get_total_norm(counted, norm_type).item()
    norms = stage.runtime.control.gather(norm, "gathering the norms of the gradients")
    total = torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float64), norm_type)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total


def separated(shard: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide a batch into what the model's forward takes, and what only the loss reads (labels among it).

    Raises:
        ConfigError: The family's forward makes something else of labels than a loss.
    """
    family = shard.config.model_type  # type: ignore[union-attr]
    if family in _MASKS_BY_LABELS:
        raise ConfigError(
            f"{family} attends otherwise where its forward is given labels, and a stage keeps them for the "
            "loss alone: train and score it in one process"
        )
    parameters = inspect.signature(shard.forward).parameters
    taken = set(parameters) - {"labels"}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        taken |= set(TransformersKwargs.__annotations__) - {"num_items_in_batch"}  # what they are for
    inputs = {name: value for name, value in batch.items() if name in taken}
    return inputs, {name: value for name, value in batch.items() if name not in taken}


def _cut_for_loss(
    others: Mapping[str, Any], input_ids: torch.Tensor, sizes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Cut what only the loss reads: tensors, and lists of as many things as there are rows."""
    lists = {
        name: value
        for name, value in others.items()
        if isinstance(value, (list, tuple)) and len(value) == len(input_ids)
    }
    at = 0
    for size, part in zip(sizes, cut({**others, "input_ids": input_ids}, sizes), strict=True):
        yield part | {name: value[at : at + size] for name, value in lists.items()}
        at += size


class _Loss:
    """What the rank of the head computes of the logits."""

    def __init__(
        self, stage: ConnectedStage, given: LossFunction | None, others: Mapping[str, Any], count: int | None
    ) -> None:
        self._stage, self._given, self._count = stage, given, count
        if not stage.is_last:
            return
        if given is None and getattr(stage.shard.config.get_text_config(), "output_router_logits", False):
            raise ConfigError(
                "the config asks for the routers' auxiliary loss (output_router_logits), which needs every "
                "block's router at once; set it to False, or pass a loss_fn"
            )
        if given is None and others.get("labels") is None:
            raise ConfigError("a training step needs labels in its batch, or a loss_fn")
        if count is None:
            self._count = others.get("num_items_in_batch")
        if self._count is None and others.get("labels") is not None:
            shifted = others.get("shift_labels")
            counting = others["labels"][..., 1:] if shifted is None else shifted
            self._count = int((counting != _IGNORED).sum())
            if self._count == 0:
                raise ConfigError(f"no token of the batch counts: all labels are {_IGNORED}")

    def of(self, output: Any, others: Mapping[str, Any]) -> torch.Tensor:
        """Return what a micro-batch adds to the loss of the batch.

        Raises:
            ConfigError: It is no scalar, or nothing is trained.
        """
        if self._given is not None:
            loss = self._given(output, others, self._count)
        else:
            config = self._stage.shard.config.get_text_config()
            given = {
                name: others[name] for name in ("labels", "shift_labels") if others.get(name) is not None
            }
            loss = self._stage.shard.loss_function(
                output.logits,
                vocab_size=config.vocab_size,
                num_items_in_batch=self._count,
                **{name: labels.to(output.logits.device) for name, labels in given.items()},
            )
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise ConfigError(f"loss_fn must return a tensor with one element, not {loss!r:.200}")
        if not loss.requires_grad:
            raise ConfigError("the loss depends on nothing that is trained: every parameter is frozen")
        return loss.reshape(())


@dataclass
class _Pass:
    """A micro-batch that went forward and has not come back."""

    received: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None
    gradient: Arrival | None = None
    loss: torch.Tensor | None = None


class _Passes:
    """The passes of one training step through this rank's stage."""

    def __init__(self, stage: ConnectedStage, loss: _Loss) -> None:
        self._stage, self._loss = stage, loss
        rank, lineup = stage.runtime.global_rank, stage.lineup
        self._before, self._after = lineup.before(rank), lineup.after(rank)
        self._under_way: deque[_Pass] = deque()

    def run(self, parts: Sequence[dict[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
        """Run all micro-batches, and return what each adds to the loss; nothing on ranks without the head."""
        stage = self._stage
        if not stage.body.blocks:
            return []
        position = stage.lineup.ranks.index(stage.runtime.global_rank)
        losses: list[torch.Tensor] = []
        coming = stage.expecting([part["input_ids"].shape for part in parts])
        for kind, number in one_forward_one_backward(position, len(stage.lineup.ranks), len(parts)):
            if kind == "forward":
                next(coming)
                self._forward(parts[number], others[number])
            elif (loss := self._backward()) is not None:
                losses.append(loss)
        return losses

    def _forward(self, inputs: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        under_way = _Pass()

        def arrive(hidden_states: torch.Tensor) -> torch.Tensor:
            under_way.received = hidden_states.requires_grad_()
            return under_way.received.clone()  # some blocks change what they get in place

        passed = self._stage.run(inputs, arriving=arrive)
        if self._stage.is_last:
            under_way.loss = self._loss.of(passed.output, others)
        else:
            under_way.hidden_states = passed.hidden_states
        if self._stage.links is not None and self._after is not None:
            shape, dtype = passed.hidden_states.shape, passed.hidden_states.dtype
            under_way.gradient = self._stage.links.back.ask(shape, dtype, self._after)
        self._under_way.append(under_way)

    def _backward(self) -> torch.Tensor | None:
        under_way = self._under_way.popleft()
        if under_way.loss is not None:
            under_way.loss.backward()
        elif under_way.gradient is not None and under_way.hidden_states is not None:
            gradient = under_way.gradient.wait()
            if under_way.hidden_states.requires_grad:  # else all before this is frozen
                under_way.hidden_states.backward(gradient)
        received = under_way.received
        if self._stage.links is not None and self._before is not None and received is not None:
            gradient = torch.zeros_like(received) if received.grad is None else received.grad
            self._stage.links.back.send(gradient, self._before)
        return None if under_way.loss is None else under_way.loss.detach()


@contextmanager
def _set_aside(shared: Sequence[SharedParameter]) -> Iterator[None]:
    """Add what happens inside to the gradients from before, which were summed over the ranks already."""
    parameters = [parameter.local for parameter in shared if parameter.local is not None]
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad
