"""docs/dialects.md names all that there is."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "dialects.md"


def test_the_page_names_every_dialect_and_every_field_that_is_not_built():
    from patchers.block_fields import UNBUILT_ATTENTION, UNBUILT_BLOCK, UNBUILT_FFN
    from patchers.dialects import Dialect

    page = PAGE.read_text(encoding="utf-8")
    names = [dialect.value for dialect in Dialect]
    names += [*UNBUILT_ATTENTION, *UNBUILT_FFN, *UNBUILT_BLOCK]
    assert [name for name in names if f"`{name}`" not in page] == []
