"""docs/pipeline.md: its examples run, in one process as it says."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from support.tiny import tiny_checkpoint

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_every_example_of_the_page_runs(tmp_path: Path) -> None:
    page = (DOCS / "pipeline.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names = {"checkpoint": tiny_checkpoint(tmp_path)}
    for block in blocks:
        exec(compile(block, "docs/pipeline.md", "exec"), names)
    assert names["output"].logits.shape == (8, 16, 128)
    assert torch.equal(names["tokens"][:, :4], names["prompts"])


def test_the_example_script_is_as_short_as_the_page_says() -> None:
    assert len((DOCS / "generate.py").read_text(encoding="utf-8").splitlines()) <= 36
