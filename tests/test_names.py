"""Tensor names are shown folded, and placed in their blocks."""

from __future__ import annotations

import pytest

from patchers.names import block_of, fold, fold_indices


def test_indices_are_folded_into_ranges() -> None:
    assert fold_indices([9, 3, 7, 8, 3]) == "3,7-9"
    assert fold_indices([]) == ""


def test_names_that_differ_in_one_index_are_shown_once() -> None:
    names = [f"model.layers.{i}.mlp.{p}_proj.weight" for i in (3, 7, 8, 9) for p in ("up", "down")]
    assert fold(names) == "model.layers.{3,7-9}.mlp.down_proj.weight, model.layers.{3,7-9}.mlp.up_proj.weight"
    assert fold([f"model.layers.{i}" for i in range(4)]) == "model.layers.{0-3}"
    assert fold(["lm_head.weight"]) == "lm_head.weight"


def test_long_lists_end_in_a_count() -> None:
    assert fold((f"tensor_{letter}" for letter in "abcdef"), limit=2) == "tensor_a, tensor_b, and 4 more"


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.12.mlp.up_proj.weight", 12),
        ("transformer.h.0.attn.c_attn.weight", 0),
        ("gpt_neox.layers.3.attention.bias", 3),
        ("layers.7.self_attn.q_proj.weight", 7),
        ("lm_head.weight", None),
        ("model.embed_tokens.weight", None),
    ],
)
def test_block_is_read_off_the_name(name: str, block: int | None) -> None:
    assert block_of(name) == block
