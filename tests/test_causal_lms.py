"""The committed table of all causal language models says what is found out about them today."""

from __future__ import annotations

import random

import pytest
from support.causal_lms import ENTRIES, committed_rows, row
from support.families import TEXT_FAMILIES

SAMPLE = random.Random(0).sample(sorted(set(ENTRIES) - set(TEXT_FAMILIES)), 24)
# Whether its vision tower can be built depends on an optional package.
DEPENDS_ON_PACKAGES = {"gemma3n"}


def test_every_entry_has_a_row() -> None:
    assert list(committed_rows()) == list(ENTRIES)
    assert len(ENTRIES) >= 189


def test_most_entries_are_derived_and_the_others_say_why() -> None:
    derived = [entry for entry, text in committed_rows().items() if text.endswith("|  |")]
    assert len(derived) >= 165
    assert set(TEXT_FAMILIES) <= set(derived)
    for entry in set(ENTRIES) - set(derived):
        reason = committed_rows()[entry].split(" | ")[-1]
        assert len(reason) > 20, entry


@pytest.mark.parametrize("entry", SAMPLE)
def test_rows_of_some_entries_are_as_committed(entry: str) -> None:
    assert entry in DEPENDS_ON_PACKAGES or row(entry) == committed_rows()[entry]


@pytest.mark.slow
@pytest.mark.parametrize("entry", sorted(set(ENTRIES) - set(SAMPLE)))
def test_rows_of_all_other_entries_are_as_committed(entry: str) -> None:
    assert entry in DEPENDS_ON_PACKAGES or row(entry) == committed_rows()[entry]
