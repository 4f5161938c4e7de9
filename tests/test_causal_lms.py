"""The committed table of all causal language models says what is found out about them today."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.by_hand import (
    covering,
    decodes_as_without_cache,
    logits_of,
    model_by_hand,
    patched_model,
)
from support.causal_lms import ENTRIES, VERSION, committed_rows, committed_version, row, small_config
from support.compare import assert_same_tensors
from support.families import TEXT_FAMILIES, VISION_FAMILIES, drawn_model

from patchers import ModelDescriptor
from patchers.capability import layer_capabilities
from sharded_ckpt import load_and_shard_model

pytestmark = pytest.mark.families
SAMPLE = random.Random(0).sample(sorted(set(ENTRIES) - set(TEXT_FAMILIES)), 24)
# Whether its vision tower can be built depends on an optional package.
DEPENDS_ON_PACKAGES = {"gemma3n"}
of_its_version = pytest.mark.skipif(
    committed_version() != VERSION,
    reason=f"the committed table is of transformers {committed_version()}, installed is {VERSION}",
)


@of_its_version
def test_every_entry_has_a_row() -> None:
    assert list(committed_rows()) == list(ENTRIES)


def test_most_entries_are_derived_and_the_others_say_why() -> None:
    derived = [entry for entry in committed_rows() if is_derived(entry)]
    assert len(committed_rows()) >= 196
    assert len(derived) >= 180
    assert len([entry for entry in derived if committed_rows()[entry].endswith("|  |")]) >= 158
    assert set(TEXT_FAMILIES) <= set(derived)
    for entry in set(committed_rows()) - set(derived):
        reason = committed_rows()[entry].split(" | ")[-1]
        assert len(reason) > 20, entry


def is_derived(entry: str) -> bool:
    return committed_rows()[entry].split(" | ")[1].strip() != ""


RUN = [
    entry
    for entry, text in committed_rows().items()
    if text.endswith("|  |") and entry in set(ENTRIES) - {*TEXT_FAMILIES, *VISION_FAMILIES}
]


@pytest.mark.slow
@pytest.mark.parametrize("entry", RUN)
def test_what_the_table_claims_is_computed_as_by_hand_and_loaded_in_shards(
    entry: str, tmp_path: Path
) -> None:
    config = small_config(entry)
    descriptor = ModelDescriptor.from_config(config)
    native = drawn_model(config)
    decodes = is_true(decodes_as_without_cache, native)
    for kinds in covering(layer_capabilities(config, descriptor), seed=0, family=entry):
        model = patched_model(config, kinds, descriptor)
        by_hand = logits_of(model_by_hand(config, kinds, model, descriptor))
        torch.testing.assert_close(
            logits_of(model), by_hand, rtol=1e-5, atol=1e-5, msg=lambda m, kinds=kinds: f"{kinds}: {m}"
        )
        assert not decodes or decodes_as_without_cache(model), f"cached decode: {kinds}"
    native.save_pretrained(tmp_path)
    reference = type(native).from_pretrained(tmp_path)
    count = len(list(native.get_submodule(descriptor.layers).children()))
    for owned in (set(range(0, count, 2)), set(range(1, count, 2)), set(range(count))):
        shard = load_and_shard_model(descriptor, tmp_path, owned)
        assert_same_tensors(shard, reference, partial=len(owned) < count)


def is_true(check: Callable[[Any], bool], model: Any) -> bool:
    """Whether the native model passes a check; some do not run it."""
    try:
        return check(model)
    except (RuntimeError, ValueError, IndexError):
        return False


@of_its_version
@pytest.mark.parametrize("entry", SAMPLE)
def test_rows_of_some_entries_are_as_committed(entry: str) -> None:
    assert entry in DEPENDS_ON_PACKAGES or row(entry) == committed_rows()[entry]


@of_its_version
@pytest.mark.slow
@pytest.mark.parametrize("entry", sorted(set(ENTRIES) - set(SAMPLE)))
def test_rows_of_all_other_entries_are_as_committed(entry: str) -> None:
    assert entry in DEPENDS_ON_PACKAGES or row(entry) == committed_rows()[entry]
