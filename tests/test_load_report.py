"""A load report as people read it."""

from __future__ import annotations

from sharded_ckpt import LoadReport

ODD = LoadReport("<ckpt>", (0, 1), 4, 3, 2_000_000, 0.5, "direct", unexpected=("a.0.b", "a.1.b"))
TITLE = "ckpt>: blocks 0-1 of 4, 3 tensors, 2.0 MB in 0.50 s (direct)"


def test_printed_it_is_a_line_for_the_load_and_one_for_each_oddity() -> None:
    assert str(ODD) == f"<{TITLE}\n  unexpected: a.{{0-1}}.b"


def test_in_a_notebook_it_is_a_table() -> None:
    html = ODD._repr_html_()
    assert html.startswith(f"<table><caption>&lt;{TITLE.replace('>', '&gt;')}</caption>")
    assert "<td>unexpected: a.{0-1}.b</td>" in html
