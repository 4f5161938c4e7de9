"""Trainings are killed while they save, resumed while others save, and saved by two at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import checkpoint_savers
from support.forks import run_apart


@pytest.mark.slow
def test_a_training_that_is_killed_at_any_moment_of_a_save_goes_on_from_the_step_before_or_from_this_one(
    tmp_path: Path,
) -> None:
    """F2, D3."""
    counts = run_apart(checkpoint_savers.die_at_every_operation, str(tmp_path / "run"))
    assert counts["died"] > 50
    assert counts["before"] > 40
    assert counts["after"] > 0


def test_a_training_can_be_resumed_at_any_moment_while_another_process_saves_and_removes(
    tmp_path: Path,
) -> None:
    """D7: what is being read stays; what was removed before it was opened is looked for again."""
    counts = run_apart(checkpoint_savers.load_while_another_saves, str(tmp_path / "run"), 60)
    assert counts["steps"] > 3


def test_two_processes_that_save_into_one_run_never_leave_it_broken(tmp_path: Path) -> None:
    """D6: each save is whole, or refused because another one of its step is under way."""
    counts = run_apart(checkpoint_savers.save_by_two, str(tmp_path / "run"), 30)
    assert set(counts) <= {"saved", "refused"}, counts
    assert counts["saved"] >= 30
