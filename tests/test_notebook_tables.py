"""What a notebook shows of our objects: well-formed HTML, everything escaped, the same as their text says."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.hollow import LLAMA, hollow_checkpoint, llama_shapes, pruned_checkpoint
from transformers import LlamaConfig

from patchers import AttentionConfig, BlockConfig, FFNConfig, ModelDescriptor
from sharded_ckpt import LoadReport, plan_ownership
from sharded_ckpt.checkpoint.index import open_index
from sharded_ckpt.checkpoint.source import open_source
from sharded_ckpt.checkpoint.verify import verify
from sharded_ckpt.report.difference import compare
from sharded_ckpt.report.model_blocks import model_blocks
from sharded_ckpt.report.overview import overview

EVIL = 'x<script>alert("1")</script>&amp;'


class Cells(HTMLParser):
    """Reads tables, and fails where a tag is not closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in {"table", "caption", "thead", "tbody", "tr", "th", "td", "p", "br"}, tag
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data
        else:
            self.texts.append(data)


def shown(what: Any) -> Cells:
    cells = Cells()
    cells.feed(what._repr_html_())
    cells.close()
    assert not cells.open
    return cells


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned_checkpoint(tmp_path_factory.mktemp("notebook") / "model")


def test_an_index_is_a_table_of_files(folder: Path) -> None:
    index = open_index(open_source(folder))
    cells = shown(index)
    assert cells.texts == [
        f"{folder}: 25 tensors in 2 files, 174.85 kB as model.safetensors.index.json says",
    ]
    assert cells.rows == [
        ["file", "tensors", "of blocks"],
        ["model-00001-of-00002.safetensors", "13", "0-1"],
        ["model-00002-of-00002.safetensors", "12", "1-2"],
    ]
    assert str(index).splitlines()[1] == "file                              tensors  of blocks"
    assert "embed_tokens" not in repr(index), "a hundred thousand names are no answer to a question"


def test_the_blocks_of_a_model_are_a_table_of_kinds(folder: Path) -> None:
    blocks = model_blocks(folder)
    assert shown(blocks).rows == [
        ["blocks", "number", "attention", "FFN"],
        ["0", "1", "2 KV heads", "96 wide"],
        ["1", "1", "no-op", "96 wide"],
        ["2", "1", "2 KV heads", "48 wide"],
        ["3", "1", "no-op", "no-op"],
    ]
    assert str(blocks).split()[:4] == ["blocks", "number", "attention", "FFN"]
    assert blocks[1] == BlockConfig(AttentionConfig(no_op=True), FFNConfig(96))


def test_a_block_config_is_a_row() -> None:
    block = BlockConfig(AttentionConfig(8), FFNConfig(replace_with_linear=True))
    assert shown(block).rows[1] == ["0", "1", "8 KV heads", "linear"]


def test_a_descriptor_says_where_the_parts_are() -> None:
    descriptor = ModelDescriptor.from_config(LlamaConfig(num_hidden_layers=1))
    cells = shown(descriptor)
    assert cells.texts == ["llama: LlamaForCausalLM"]
    assert cells.rows == [
        ["part", "where"],
        ["layers", "model.layers"],
        ["embedding", "model.embed_tokens"],
        ["final norm", "model.norm"],
        ["head", "lm_head"],
        ["layer classes", "LlamaDecoderLayer"],
        *([["attention", "self_attn"], ["ffn", "mlp"]] if "layer_kinds" in vars(descriptor) else []),
    ]
    assert descriptor.ffn is not None
    assert shown(descriptor).rows[-1] == ["ffn", "mlp"]
    assert str(descriptor).startswith("llama: LlamaForCausalLM\npart")


def test_every_table_has_rows_of_one_length(folder: Path) -> None:
    plan = plan_ownership(str(folder), 2, budgets="1 GB")
    for what in (overview(folder), plan, open_index(open_source(folder)), compare(folder, folder)):
        lengths = [len(row) for row in shown(what).rows]
        assert all(length >= 2 for length in lengths)
    assert shown(verify(folder)).texts[0].startswith(f"{folder}: no problems")


def test_what_stands_in_files_is_text_and_never_markup(tmp_path: Path) -> None:
    shapes = {**llama_shapes(), EVIL: [2]}
    evil = hollow_checkpoint(tmp_path / "<b>evil", shapes, {**LLAMA, "model_type": EVIL})
    plain = hollow_checkpoint(tmp_path / "plain", llama_shapes(), LLAMA)
    report = LoadReport(EVIL, (0,), 1, 1, 8, 0.1, "direct", unexpected=(EVIL,))
    for what in (overview(evil), open_index(open_source(evil)), compare(evil, plain), report, verify(evil)):
        html = what._repr_html_()
        assert "<script" not in html
        assert "<b>" not in html
        cells = shown(what)
        texts = [*cells.texts, *(cell for row in cells.rows for cell in row)]
        assert any(EVIL in text or "<b>evil" in text for text in texts)
