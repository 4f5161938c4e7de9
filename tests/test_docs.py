"""Every block of code in the README and in docs/ runs, and prints what the page shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hollow import LLAMA, hollow_checkpoint, llama_shapes, pruned_checkpoint
from support.pages import (
    PAGES,
    ROOT,
    Block,
    blocks_of,
    name_of,
    run_bash,
    run_console,
    run_script,
    run_session,
    run_under_torchrun,
)
from support.tiny import heterogeneous_checkpoint, tiny_checkpoint

from patchers import descriptor
from sharded_ckpt.demo import WeightsUnavailableError, smollm2_folder, tiny_folder

LANGUAGES = {"python", "console", "bash", "text"}
SHOWN_ONLY = {"README.md": 1, "docs/concepts.md": 1, "docs/pipeline.md": 2}
"""How many blocks are `text`: drawings, what a failure looks like, and a command for several machines."""


def _readme(folder: Path) -> None:
    (folder / "path" / "to").mkdir(parents=True)
    heterogeneous_checkpoint(folder).rename(folder / "path" / "to" / "checkpoint")


def _children(folder: Path) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    tiny_checkpoint(folder, layers=4, **sizes).rename(folder / "parent")


def _command_line(folder: Path) -> None:
    pruned_checkpoint(folder / "model")
    hollow_checkpoint(folder / "parent", llama_shapes(), LLAMA)
    tiny_folder(folder / "with-tokenizer")


def _first_hour(folder: Path) -> None:
    try:
        smollm2_folder(progress=False)
    except WeightsUnavailableError as error:
        pytest.skip(str(error))


STAGES: dict[str, Callable[[Path], Any]] = {
    "README.md": _readme,
    "docs/children.md": _children,
    "docs/command_line.md": _command_line,
    "docs/concepts.md": lambda folder: heterogeneous_checkpoint(folder).rename(folder / "model"),
    "docs/first_hour.md": _first_hour,
    "docs/from_plain_transformers.md": lambda folder: tiny_checkpoint(folder).rename(folder / "plain"),
    "docs/from_puzzletron.md": lambda folder: heterogeneous_checkpoint(folder).rename(
        folder / "anymodel-checkpoint"
    ),
    "docs/ownership.md": lambda folder: heterogeneous_checkpoint(folder).rename(folder / "model"),
    "docs/pipeline.md": lambda folder: tiny_folder(folder / "model"),
    "docs/saving.md": lambda folder: tiny_checkpoint(folder).rename(folder / "model"),
    "docs/training_and_scoring.md": lambda folder: tiny_checkpoint(folder, layers=4).rename(folder / "model"),
    "docs/training_state.md": lambda folder: tiny_checkpoint(folder).rename(folder / "model"),
}
"""What the examples of a page find in the folder where they run."""

SLOW = {"docs/first_hour.md", "docs/pipeline.md"}  # pages that start ranks
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
FOR_RANKS = [block for block in BLOCKS if block.is_for_ranks]
COMMANDS = [block for block in BLOCKS if block.language == "bash" and block.page != "README.md"]
"""Those of the README are what CI runs before anything else."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(descriptor, "_OWN", {})
    return tmp_path


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []
    fences = sum(len(re.findall(r"^\s*```", page.read_text(), flags=re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(BLOCKS)
    shown_only = [block.page for block in BLOCKS if block.language == "text"]
    assert {page: shown_only.count(page) for page in shown_only} == SHOWN_ONLY


def _runs_here(block: Block) -> bool:
    return block.is_session or block.is_script or block.language == "console"


SLOWLY = [pytest.mark.slow, pytest.mark.timeout(480)]
TOP_TO_BOTTOM = [
    pytest.param(page, id=name_of(page), marks=SLOWLY if name_of(page) in SLOW else [])
    for page in PAGES
    if any(map(_runs_here, blocks_of(page)))
]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own call
@pytest.mark.parametrize("page", TOP_TO_BOTTOM)
def test_a_page_runs_from_top_to_bottom(page: Path, folder: Path) -> None:
    STAGES.get(name_of(page), lambda folder: None)(folder)
    names: dict[str, Any] = {"__name__": __name__}
    for block in filter(_runs_here, blocks_of(page)):
        if block.is_session:
            run_session(block, names)
        elif block.is_script:
            run_script(block, names)
        else:
            run_console(block)


@pytest.mark.slow
@pytest.mark.parametrize("block", FOR_RANKS, ids=str)
def test_a_script_for_ranks_runs_under_torchrun(block: Block, folder: Path) -> None:
    STAGES[block.page](folder)
    said = run_under_torchrun(block, folder)
    if block.page == "README.md":  # the lines of two ranks may meet
        assert all(line in said for line in ("rank 0 owns (0, 1, 2)", "rank 1 owns (3, 4, 5, 6)")), said


@pytest.mark.slow
@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_a_command_runs(block: Block, folder: Path) -> None:
    STAGES[block.page](folder)
    assert run_bash(block, folder)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_links_to_exists(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    named = re.findall(r"`([\w.-]+/[\w./-]+\.(?:py|md))`", text)
    assert missing + [path for path in named if not (ROOT / path).exists()] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [path.name for path in PAGES if path.parent.name == "docs" and path.name != "README.md"]
    assert [name for name in pages if f"]({name})" not in index] == []


def test_the_example_script_is_as_short_as_the_pipeline_page_says() -> None:
    assert len((ROOT / "docs" / "generate.py").read_text(encoding="utf-8").splitlines()) <= 36
