"""What the ranks of the training step's tests do: take steps, and compare them with those of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sharded_ckpt.loading.verbs import load_and_shard_model
from sharded_ckpt.pipeline import PipelineStage
from support.pipelines import Owned, stage_of

LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Case:
    """A training step, and how it is cut.

    Attributes:
        checkpoint: The model.
        batches: Whose gradients add up.
        owned: The blocks of each rank; None for "auto".
        micro_batches: Into how many parts each batch is cut, or the rows of each.
        frozen: Parameters with one of these in their names.
        checkpointing: Whether activations are computed again in the backward pass.
        clip: The norm that gradients are clipped to.
        loss_fn: In place of the model's own.
    """

    checkpoint: Path
    batches: Sequence[Mapping[str, torch.Tensor]]
    owned: Owned = None
    micro_batches: int | Sequence[int] = 1
    frozen: tuple[str, ...] = ()
    checkpointing: bool = False
    clip: float = 1e-2
    loss_fn: Callable[..., torch.Tensor] | None = None


@dataclass(frozen=True)
class Step:
    """What came of a step.

    Attributes:
        losses: Of each batch.
        gradients: By the name of the parameter in the whole model, before clipping.
        norm: Over all parameters.
        parameters: After a step of SGD with the clipped gradients.
    """

    losses: list[float]
    gradients: dict[str, torch.Tensor]
    norm: float
    parameters: dict[str, torch.Tensor]


def step_of_whole(case: Case) -> Step:
    """Take the step in one process, by transformers and torch alone."""
    model = load_and_shard_model("auto", case.checkpoint, dtype=torch.float32, materialize=True)
    prepare(model, case)
    losses = []
    for batch in case.batches:
        if case.loss_fn is None:
            loss = model(**batch, use_cache=False).loss
        else:
            count = int((batch["labels"][:, 1:] != -100).sum())
            loss = case.loss_fn(model(batch["input_ids"], use_cache=False), batch, count)
        loss.backward()
        losses.append(loss.item())
    gradients = gradients_of(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip).item()
    torch.optim.SGD(model.parameters(), LEARNING_RATE).step()
    return Step(losses, gradients, norm, {n: p.detach() for n, p in model.named_parameters()})


def step_of_stage(case: Case) -> Step:
    """Take this rank's part of the step."""
    stage: PipelineStage = stage_of(case.checkpoint, case.owned, materialize=True)
    prepare(stage.shard, case)
    losses = [
        stage.train_step(batch, case.loss_fn, micro_batches=case.micro_batches).item()
        for batch in case.batches
    ]
    gradients = gradients_of(stage.shard)
    norm = stage.clip_grad_norm_(case.clip).item()
    if any(True for _ in stage.shard.parameters()):  # torch makes no optimizer of nothing
        torch.optim.SGD(stage.shard.parameters(), LEARNING_RATE).step()
    return Step(losses, gradients, norm, {n: p.detach() for n, p in stage.shard.named_parameters()})


def prepare(model: PreTrainedModel, case: Case) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(word in name for word in case.frozen))
    if case.checkpointing:
        model.train()
        model.activation_checkpointing_enable()


def gradients_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distillation(
    outputs: Any, micro_batch: Mapping[str, torch.Tensor], num_items_in_batch: int
) -> torch.Tensor:
    """A loss that reads more than labels: KL to the logits of a teacher, over all tokens."""
    student = outputs.logits.log_softmax(-1)
    teacher = micro_batch["teacher_logits"].log_softmax(-1)
    return torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True) / num_items_in_batch


def weighted_loss(
    outputs: Any, micro_batch: Mapping[str, torch.Tensor], num_items_in_batch: int
) -> torch.Tensor:
    """A loss that weighs rows by a list of numbers."""
    log_probs = outputs.logits[:, :-1].log_softmax(-1).gather(-1, micro_batch["input_ids"][:, 1:, None])
    of_rows = log_probs[..., 0].sum(-1)
    return -(of_rows * torch.tensor(micro_batch["weights"])).sum() / num_items_in_batch


def loss_with_frozen_end(checkpoint: Path, batch: Mapping[str, torch.Tensor], frozen_on: int) -> None:
    """Freeze the embedding, of which two ranks hold copies, on one of them only."""
    stage = stage_of(checkpoint, materialize=True)
    for name, parameter in stage.shard.named_parameters():
        ends = "embed_tokens" in name or "lm_head" in name
        parameter.requires_grad_(not (ends and stage.runtime.global_rank == frozen_on))
    stage.train_step(batch)


def step_on(
    checkpoint: Path, batch: Mapping[str, torch.Tensor], frozen: bool = False, micro_batches: int = 1
) -> None:
    """Take a step that cannot be."""
    stage = stage_of(checkpoint, materialize=True)
    stage.shard.requires_grad_(not frozen)
    stage.train_step(batch, micro_batches=micro_batches)


def step_with_odd_batch(checkpoint: Path, batch: Mapping[str, torch.Tensor]) -> None:
    """Take a step that rank 1 cuts into rows that the batch does not have."""
    stage = stage_of(checkpoint, materialize=True)
    stage.train_step(batch, micro_batches=[5, 2] if stage.runtime.global_rank == 1 else [5, 1])


def with_other_ends(checkpoint: Path, batch: Mapping[str, torch.Tensor]) -> None:
    """Take a step with copies of the embedding that are not equal."""
    stage = stage_of(checkpoint, materialize=True)
    if stage.is_last:
        with torch.no_grad():
            stage.shard.lm_head.weight[3, 3] += 1
    stage.train_step(batch)
