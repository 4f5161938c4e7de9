"""The model over several ranks gives what it gives in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gloo import Gloo
from support.pipelines import decoded, logits_of, stage_of
from support.tiny import heterogeneous_checkpoint
from transformers import PreTrainedModel

from patchers.errors import CollectiveError
from sharded_ckpt import PipelineStage, load_and_shard_model

IDS = torch.randint(4, 128, (4, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [0] + [1] * 8, [1] * 9])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute here with one thread, as the ranks do: more may add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def whole(checkpoint: Path) -> PreTrainedModel:
    return load_and_shard_model("auto", checkpoint, dtype=torch.float32)


def reference(checkpoint: Path, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return whole(checkpoint)(**inputs).logits


POSITIONS = torch.arange(2, 11)[None]
CALLS: list[tuple[dict[str, Any], dict[str, Any], list[int]]] = [  # inputs, options, rows of each part
    ({"input_ids": IDS}, {}, [4]),
    ({"input_ids": IDS, "attention_mask": MASK}, {}, [4]),
    ({"input_ids": IDS, "attention_mask": MASK}, {"micro_batches": 3}, [2, 1, 1]),
    ({"input_ids": IDS}, {"micro_batches": [3, 1], "broadcast": True}, [3, 1]),
    ({"input_ids": IDS[:1], "position_ids": POSITIONS}, {"micro_batches": 4}, [1]),
]


def expected(checkpoint: Path) -> list[torch.Tensor]:
    model, results = whole(checkpoint), []
    for inputs, _, rows in CALLS:
        parts = zip(*(value.split(rows) for value in inputs.values()), strict=True)
        with torch.no_grad():
            logits = [model(**dict(zip(inputs, part, strict=True))).logits for part in parts]
        results.append(torch.cat(logits))
    return results


@pytest.mark.parametrize(("world_size", "owned"), [(1, None), (2, None), (3, [[0, 1], [], [2, 3, 4, 5, 6]])])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_bit_equal_to_those_of_the_whole_model(
    gloo: Gloo, folder: Path, world_size: int, owned: Any, tied: bool
) -> None:
    checkpoint = heterogeneous_checkpoint(folder, tied=tied)
    ranks = gloo.run_ok(
        logits_of,
        checkpoint,
        owned,
        [inputs | options for inputs, options, _ in CALLS],
        world_size=world_size,
    )
    for number, logits in enumerate(expected(checkpoint)):
        assert torch.equal(ranks[-1][number], logits)
        for rank in ranks[:-1]:  # all of them where it was asked for, else the last one alone
            assert rank[number] is None if number != 3 else torch.equal(rank[number], logits)


@pytest.mark.parametrize("owned", [None, [[0, 1], [], [2, 3, 4, 5, 6], []], [[], [0, 1, 2], [3, 4], [5, 6]]])
def test_decoding_with_a_cache_equals_the_whole_model_with_padding(
    gloo: Gloo, folder: Path, owned: Any
) -> None:
    checkpoint = heterogeneous_checkpoint(folder)
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    logits = reference(checkpoint, input_ids=IDS, attention_mask=MASK, position_ids=positions)
    ranks = gloo.run_ok(_decoded_padded, checkpoint, owned, world_size=4)
    (parts,) = (parts for parts in ranks if parts[0] is not None)  # those of the rank with the head
    assert ((torch.cat(parts, dim=1) - logits) * MASK[..., None]).abs().max() <= 1e-5 * logits.abs().max()


def _decoded_padded(checkpoint: Path, owned: Any) -> list[Any]:
    return decoded(checkpoint, owned, IDS, 4, attention_mask=MASK)


def test_positions_of_logits_are_not_taken_for_rows(gloo: Gloo, folder: Path) -> None:
    checkpoint = heterogeneous_checkpoint(folder)
    call = {"input_ids": IDS, "logits_to_keep": torch.tensor([8, 0, 3, 3])}  # as many as rows
    logits = gloo.run_ok(logits_of, checkpoint, None, [call | {"micro_batches": 2}])[-1][0]
    assert torch.allclose(logits, reference(checkpoint, **call), rtol=1e-5, atol=1e-5)


def tuples(checkpoint: Path) -> list[Any]:
    stage = stage_of(checkpoint)
    options = [{}, {"micro_batches": 2}, {"broadcast": True}]
    return [stage(IDS, return_dict=False, use_cache=False, **option) for option in options]


def test_tuples_are_returned_where_they_are_asked_for(gloo: Gloo, folder: Path) -> None:
    checkpoint = heterogeneous_checkpoint(folder)
    logits = reference(checkpoint, input_ids=IDS)
    first, last = gloo.run_ok(tuples, checkpoint)
    assert first[:2] == [None, None]
    for (found,) in (first[2], *last):
        assert torch.allclose(found, logits, rtol=1e-5, atol=1e-5)


def cast(checkpoint: Path) -> torch.Tensor | None:
    stage = stage_of(checkpoint)
    stage.shard.to(torch.bfloat16)
    output = stage(IDS, attention_mask=MASK)
    return None if output is None else output.logits


def test_a_shard_may_be_cast_after_loading_like_any_model(gloo: Gloo, folder: Path) -> None:
    checkpoint = heterogeneous_checkpoint(folder)
    with torch.no_grad():
        expected = whole(checkpoint).to(torch.bfloat16)(IDS, attention_mask=MASK).logits
    assert torch.equal(gloo.run_ok(cast, checkpoint, world_size=3)[-1], expected)


def cast_late(checkpoint: Path) -> str:
    stage = stage_of(checkpoint)
    stage(IDS)
    stage.shard.to(torch.bfloat16)
    with pytest.raises(CollectiveError) as caught:
        stage(IDS)
    assert stage.is_last == (PipelineStage(stage.shard, stage.runtime)(IDS) is not None)
    return str(caught.value)


def test_a_shard_that_is_cast_later_needs_a_new_stage(gloo: Gloo, folder: Path) -> None:
    for text in gloo.run_ok(cast_late, heterogeneous_checkpoint(folder)):
        assert "where a shard was cast to another dtype, make a new PipelineStage of it on all ranks" in text


def test_only_hidden_states_and_ids_travel(gloo: Gloo, folder: Path) -> None:
    checkpoint = heterogeneous_checkpoint(folder)
    sent = gloo.run_ok(_sent_by_decoding, checkpoint, world_size=3)
    hidden, ids = 4 * 64 * 4, 4 * 8  # four rows of 64 float32 numbers; four token ids
    assert sent == [hidden, hidden, 2 * ids]  # a token; the last stage tells the ids to both others


def _sent_by_decoding(checkpoint: Path) -> float:
    """Return the bytes that this rank sends for one more token of each row."""
    stage = stage_of(checkpoint)
    assert stage.links is not None
    totals = []
    for new in (4, 14, 24):  # the form of hidden states is told once
        before = stage.links.sent_bytes
        stage.generate(IDS, max_new_tokens=new, do_sample=False, eos_token_id=None, micro_batches=[3, 1])
        totals.append(stage.links.sent_bytes - before)
    assert (totals[2] - totals[1]) % 10 == 0
    return (totals[2] - totals[1]) // 10
