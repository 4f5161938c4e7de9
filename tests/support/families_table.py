"""The table of families in docs/families.md: what each can do, and why not.

Run this file to write it anew. Each column is one that tests measure on every family of `support.families`:
loading in `test_family_loading.py`, saving in `test_family_saving.py`, the others in
`test_family_heterogeneous.py`, which builds what `capabilities` says and compares it with a model changed by
hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from patchers import capabilities
from support.families import NOT_CACHED, TEXT_FAMILIES, VISION_FAMILIES, family_config

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN = "<!-- table: written by tests/support/families_table.py -->\n"
END = "<!-- end of the table -->\n"

CELLS = {
    "FFN width": ("ffn_width", "expert_width"),
    "query heads": ("query_heads",),
    "KV heads": ("kv_heads",),
    "experts": ("experts",),
    "no-op attention": ("no_op_attention",),
    "no-op FFN": ("no_op_ffn",),
    "linear attention": ("linear_attention",),
    "linear FFN": ("linear_ffn",),
}
_ALWAYS = ("sharded load", "save/reload")
_DECODING = ("cached decode", "padded batch")


def table() -> str:
    """The table in Markdown, with the reasons below it."""
    reasons: dict[str, int] = {}
    head = ["family", *_ALWAYS, *CELLS, *_DECODING]
    lines = [head, ["---"] * len(head)]
    for family in (*TEXT_FAMILIES, *VISION_FAMILIES):
        can = capabilities(family_config(family))
        answers = [_first_true([can[cell] for cell in cells]) for cells in CELLS.values()]
        answers += [NOT_CACHED.get(family, True)] * len(_DECODING)
        lines.append([family, *["yes"] * len(_ALWAYS), *(_shown(answer, reasons) for answer in answers)])
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    notes = "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    return f"{rows}\n{notes}"


def document() -> str:
    """The whole document with the table in its place."""
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def _first_true(answers: list[bool | str]) -> bool | str:
    return True if True in answers else answers[0]


def _shown(answer: bool | str, reasons: dict[str, int]) -> str:
    return "yes" if answer is True else f"no ({reasons.setdefault(str(answer), len(reasons) + 1)})"


def count(cell: str, rows: Mapping[str, Mapping[str, str]]) -> int:
    """How many text families can do something."""
    return sum(rows[family][cell] == "yes" for family in TEXT_FAMILIES)


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """The cells of a document's table, by family and column."""
    lines = [line for line in text.split(BEGIN)[1].split(END)[0].splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


if __name__ == "__main__":
    DOCUMENT.write_text(document())
