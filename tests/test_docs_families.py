"""The table of families in the documentation says what the tests measure, and as much as is promised."""

from __future__ import annotations

import pytest
from support.families_table import DOCUMENT, count, document, rows_of


def test_committed_table_is_what_is_found_now() -> None:
    assert DOCUMENT.read_text() == document(), (
        "run: PYTHONPATH=.:tests python tests/support/families_table.py"
    )


FLOORS = {
    "sharded load": 60,
    "save/reload": 60,
    "no-op attention": 53,
    "no-op FFN": 53,
    "FFN width": 50,
    "query heads": 48,
    "KV heads": 50,
    "cached decode": 51,
    "padded batch": 51,
}


@pytest.mark.parametrize("cell", FLOORS)
def test_as_many_families_as_promised_can_do_it(cell: str) -> None:
    assert count(cell, rows_of(DOCUMENT.read_text())) >= FLOORS[cell]
