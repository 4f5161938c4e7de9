"""A training step over ranks gives every parameter the gradient that it gets in one process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import family_model
from support.gloo import Gloo, RankFailure
from support.tiny import BLOCKS, heterogeneous_checkpoint, tiny_checkpoint
from support.training_ranks import (
    Case,
    Step,
    distillation,
    loss_with_frozen_end,
    step_of_stage,
    step_of_whole,
    step_on,
    step_with_odd_batch,
    weighted_loss,
    with_other_ends,
)

from patchers.errors import ConfigError
from sharded_ckpt import PipelineStage
from sharded_ckpt.pipeline.one_f_one_b import one_forward_one_backward

TIED = {"lm_head.weight": "model.embed_tokens.weight"}
TOLERANCE = 1e-5


def batch(seed: int = 1, rows: int = 6, tokens: int = 10) -> dict[str, torch.Tensor]:
    """Rows with different numbers of labels that count, some of them padded on the left."""
    ids = torch.randint(4, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(rows):
        labels[row, : row + 1] = -100
        mask[row, : row % 3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def assert_equal_steps(ranks: list[Step], whole: Step) -> None:
    largest = max(gradient.abs().max().item() for gradient in whole.gradients.values())
    seen: set[str] = set()
    for step in ranks:
        assert step.losses == pytest.approx(whole.losses, rel=TOLERANCE)
        assert step.norm == pytest.approx(whole.norm, rel=TOLERANCE)
        for name, parameter in step.parameters.items():
            of_whole = name if name in whole.parameters else TIED[name]
            seen.add(of_whole)
            assert_close(parameter, whole.parameters[of_whole], name)
            if of_whole in whole.gradients:
                assert_close(step.gradients[name], whole.gradients[of_whole], name, 1e-3 * largest)
            else:
                assert name not in step.gradients or not step.gradients[name].any()
    assert seen == set(whole.parameters)


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str, least: float = 0.0) -> None:
    scale = max(expected.abs().max().item(), least)  # some gradients are zero but for rounding (keys' biases)
    assert (found - expected).abs().max().item() <= TOLERANCE * scale, name


HETEROGENEOUS = {"owned": [[0, 1], [], [2, 3, 4, 5, 6]]}  # a rank that owns nothing; blocks without attention
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("plain", 1, {"micro_batches": 3}),
    ("plain", 2, {}),
    ("plain", 4, {"micro_batches": 6}),
    ("tied", 2, {"micro_batches": [3, 1, 2]}),
    ("tied", 3, {"micro_batches": 2, "checkpointing": True}),
    ("tied", 1, {}),
    ("heterogeneous", 3, {"micro_batches": 4, **HETEROGENEOUS}),
    ("heterogeneous", 4, {"micro_batches": 3, "frozen": ("layers.0", "embed", "layers.4.mlp")}),
    ("heterogeneous, tied", 2, {"micro_batches": 2, "frozen": ("self_attn",), "checkpointing": True}),
    ("heterogeneous, tied", 4, {"micro_batches": 5}),
]


@pytest.mark.parametrize(("kind", "world_size", "options"), CASES)
def test_a_step_equals_that_of_the_whole_model(
    gloo: Gloo, folder: Path, kind: str, world_size: int, options: dict[str, Any]
) -> None:
    make = heterogeneous_checkpoint if "heterogeneous" in kind else tiny_checkpoint
    case = Case(make(folder, tied="tied" in kind), [batch(1), batch(2)], **options)
    ranks = gloo.run_ok(step_of_stage, case, world_size=world_size)
    assert_equal_steps(ranks, step_of_whole(case))


def test_copies_of_a_tied_parameter_stay_equal_bit_for_bit(gloo: Gloo, folder: Path) -> None:
    case = Case(tiny_checkpoint(folder, tied=True), [batch(1), batch(2)], micro_batches=3)
    first, _, last = gloo.run_ok(step_of_stage, case, world_size=3)
    embedding, head = first.parameters["model.embed_tokens.weight"], last.parameters["lm_head.weight"]
    assert torch.equal(embedding, head)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe", "opt", "falcon_h1", "zamba2"])
def test_steps_of_other_families_are_equal(gloo: Gloo, folder: Path, family: str) -> None:
    checkpoint = folder / family
    if not checkpoint.exists():
        family_model(family).save_pretrained(checkpoint)
    parts = 1 if family == "zamba2" else 2  # its long recurrences round differently in smaller batches
    case = Case(checkpoint, [batch()], micro_batches=parts)
    assert_equal_steps(gloo.run_ok(step_of_stage, case, world_size=2), step_of_whole(case))


def test_a_loss_may_read_more_than_labels(gloo: Gloo, folder: Path) -> None:
    whole = {**batch(), "teacher_logits": torch.randn(6, 10, 128, generator=torch.Generator().manual_seed(3))}
    del whole["attention_mask"]
    case = Case(tiny_checkpoint(folder), [whole], micro_batches=4, loss_fn=distillation)
    assert_equal_steps(gloo.run_ok(step_of_stage, case, world_size=2), step_of_whole(case))


def test_lists_for_the_loss_are_cut_like_tensors(gloo: Gloo, folder: Path) -> None:
    weighted = {**batch(), "weights": [0.1, 2.0, 0.5, 1.0, 3.0, 0.2]}
    del weighted["attention_mask"]
    case = Case(tiny_checkpoint(folder), [weighted], micro_batches=6, loss_fn=weighted_loss)
    assert_equal_steps(gloo.run_ok(step_of_stage, case, world_size=2), step_of_whole(case))


@pytest.mark.parametrize("told", [{}, {"num_items_in_batch": torch.tensor(17)}])
def test_labels_that_are_shifted_already_count_as_in_one_process(
    gloo: Gloo, folder: Path, told: dict[str, Any]
) -> None:
    shifted = {**batch(), "shift_labels": batch(seed=7)["labels"], **told}
    case = Case(tiny_checkpoint(folder), [shifted], micro_batches=[1, 5])
    assert_equal_steps(gloo.run_ok(step_of_stage, case, world_size=2), step_of_whole(case))


# What cannot be -------------------------------------------------------------------------------------------


def failures(results: list[Any]) -> list[str]:
    assert all(isinstance(result, RankFailure) for result in results)
    return [result.text for result in results]


def test_a_copy_that_is_frozen_on_one_rank_only_is_refused(gloo: Gloo, folder: Path) -> None:
    checkpoint = tiny_checkpoint(folder, tied=True)
    for text in failures(gloo.run(loss_with_frozen_end, checkpoint, batch(), 1)):
        assert "model.embed_tokens.weight is frozen on rank 1, but not on rank 0; both have copies of" in text


def test_copies_that_differ_are_refused(gloo: Gloo, folder: Path) -> None:
    checkpoint = tiny_checkpoint(folder, tied=True)
    for text in failures(gloo.run(with_other_ends, checkpoint, batch())):
        assert "ranks 0 and 1 hold different values of model.embed_tokens.weight, which is one param" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"labels": None}, "a training step needs labels in its batch, or a loss_fn"),
        ({"labels": torch.full((6, 10), -100)}, "no token of the batch counts: all labels are -100"),
        ({"output_hidden_states": True}, "output_hidden_states would be that of one rank's blocks only"),
        ({"input_ids": None}, "input_ids must be a tensor of token ids, (batch, tokens), not NoneType"),
    ],
)
def test_a_step_without_a_loss_is_refused_on_all_ranks(
    gloo: Gloo, folder: Path, change: dict[str, Any], text: str
) -> None:
    wrong = {name: value for name, value in {**batch(), **change}.items() if value is not None}
    for said in failures(gloo.run(step_on, tiny_checkpoint(folder), wrong)):
        assert text in said


def test_labels_of_other_rows_are_refused_rather_than_shared(gloo: Gloo, folder: Path) -> None:
    wrong = {**batch(), "labels": batch()["labels"][:3]}
    for said in failures(gloo.run(step_on, tiny_checkpoint(folder), wrong, False, 2)):
        assert "labels (3, 10) has 3 rows, but input_ids have 6; give it a row for each of them" in said


def test_a_batch_that_is_wrong_on_one_rank_is_told_by_all(gloo: Gloo, folder: Path) -> None:
    began = time.monotonic()
    for said in failures(gloo.run(step_with_odd_batch, tiny_checkpoint(folder), batch())):
        assert "rank 1 was given other inputs than rank 0: other arguments differ" in said
    assert time.monotonic() - began < 50  # nobody waits for who has failed


def test_a_model_without_anything_to_train_is_refused(gloo: Gloo, folder: Path) -> None:
    (text,) = failures(gloo.run(step_on, tiny_checkpoint(folder), batch(), True, world_size=1))
    assert "the loss depends on nothing that is trained: every parameter is frozen" in text


def test_a_loss_of_all_routers_is_refused_in_one_process_too() -> None:
    stage = PipelineStage(family_model("qwen3_moe", output_router_logits=True))
    with pytest.raises(ConfigError, match=r"the config asks for the routers' auxiliary loss"):
        stage.train_step(batch())


# The schedule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batches", [1, 2, 7])
def test_the_schedule_never_waits_for_what_cannot_come(stages: int, micro_batches: int) -> None:
    plans = [one_forward_one_backward(position, stages, micro_batches) for position in range(stages)]
    done: list[set[Any]] = [set() for _ in plans]
    most = [0] * stages
    progress = True
    while progress:
        progress = False
        for position, plan in enumerate(plans):
            if len(done[position]) == len(plan):
                continue
            action = plan[len(done[position])]
            needs = position - 1 if action.kind == "forward" else position + 1
            if needs in range(stages) and action not in done[needs]:
                continue
            done[position].add(action)
            held = sum(1 if kind == "forward" else -1 for kind, _ in done[position])
            most[position] = max(most[position], held)
            progress = True
    assert [len(actions) for actions in done] == [2 * micro_batches] * stages
    assert most == [min(stages - position, micro_batches) for position in range(stages)]


def test_blocks_of_every_kind_take_part() -> None:
    assert len(BLOCKS) == sum(map(len, HETEROGENEOUS["owned"]))
