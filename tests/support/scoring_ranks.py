"""What the ranks of the scoring tests do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from patchers.errors import CollectiveError
from sharded_ckpt.pipeline.scoring import ScoreResult
from support.pipelines import Owned, stage_of

Dataset = Sequence[Mapping[str, torch.Tensor]]


def scores_of(checkpoint: Path, dataset: Dataset, owned: Owned = None, **options: Any) -> ScoreResult:
    return stage_of(checkpoint, owned).score(dataset, **options)


def scores_beside_teacher(child: Path, teacher: Path, dataset: Dataset, owned: Owned) -> ScoreResult:
    return stage_of(child, owned).score(dataset, teacher=stage_of(teacher, owned), micro_batches=2)


def scores_after_a_break(
    checkpoint: Path, dataset: Dataset, resume_dir: Path, breaks_at: int
) -> tuple[str, int]:
    """Score until the data source fails; tell its error, and how many batches were taken from it."""
    stage, taken = stage_of(checkpoint), []

    def failing() -> Iterator[Mapping[str, torch.Tensor]]:
        for number, batch in enumerate(dataset):
            if number == breaks_at and stage.is_last:
                raise OSError("the data are gone")
            taken.append(number)
            yield batch

    try:
        stage.score(failing(), resume_dir=resume_dir, save_every=2, activations=True)
    except CollectiveError as error:
        return str(error), len(taken)
    return "", len(taken)


def scores_with_other_teacher(checkpoint: Path, dataset: Dataset, one: Owned, other: Owned) -> None:
    stage_of(checkpoint, one).score(dataset, teacher=stage_of(checkpoint, other))
