"""Tensors whose names differ only in their indexes are one group, whatever else is in the names."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from sharded_ckpt.checkpoint.entry import TensorEntry
from sharded_ckpt.report.tensor_groups import group_tensors

part = st.sampled_from(["a", "w1", "w3", "x0y", "layers", "0", "1", "10", "12", "٣", "é", "a\nb", ""])
names = st.lists(part, min_size=1, max_size=5).map(".".join)
entries = st.sampled_from([TensorEntry("BF16", (2, 3), 0, 12), TensorEntry("BF16", (3, 2), 0, 12)])


@given(st.lists(st.dictionaries(names, entries, max_size=12), max_size=3))
def test_every_tensor_is_in_the_group_of_its_words(files: list[dict[str, TensorEntry]]) -> None:
    groups = group_tensors((f"{number}", file.items()) for number, file in enumerate(files))
    found = [
        (file, group.words, group.shape, numbers)
        for group in groups
        for file, listed in group.numbers.items()
        for numbers in listed
    ]
    parts = [
        (f"{number}", re.split(r"\.(\d+)(?=\.|$)", name), entry.shape)
        for number, file in enumerate(files)
        for name, entry in file.items()
    ]
    expected = [(file, tuple(split[::2]), shape, tuple(split[1::2])) for file, split, shape in parts]
    assert sorted(found) == sorted(expected)
