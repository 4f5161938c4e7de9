"""Where one rank of a pipeline goes wrong, all ranks say so, and name it, in time."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.gloo import Gloo, RankFailure
from support.pipelines import Owned, stage_of
from support.tiny import tiny_checkpoint
from transformers import DynamicCache
from transformers.generation import BaseStreamer

from patchers.cache_names import CACHE_NAMES
from patchers.errors import CollectiveError, ConfigError
from sharded_ckpt.pipeline import PipelineStage

IDS = torch.arange(10, 18).reshape(2, 4)
TIMEOUT = 6.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("pipeline"))


def ill(stage: PipelineStage, what: str) -> None:
    """Make this rank's last block go wrong when it is run."""

    def go_wrong(*_: Any) -> None:
        if what == "raises":
            raise MemoryError("no room for the keys")
        if what == "stalls":
            time.sleep(3 * TIMEOUT)
        os.kill(os.getpid(), {"dies": signal.SIGKILL, "freezes": signal.SIGSTOP}[what])

    stage.shard.model.layers[stage.body.blocks[-1]].register_forward_pre_hook(go_wrong)


def run_with(checkpoint: Path, what: str, who: int) -> tuple[str, dict[int, str], float]:
    stage = stage_of(checkpoint, timeout=TIMEOUT)
    stage(IDS)
    if dist.get_rank() == who:
        ill(stage, what)
    began = time.monotonic()
    try:
        stage(IDS)
    except CollectiveError as error:
        seconds = time.monotonic() - began
        with pytest.raises(CollectiveError, match="this pipeline broke earlier"):
            stage(IDS)
        return str(error), error.failures, seconds
    raise AssertionError(f"rank {dist.get_rank()} did not notice")


@pytest.mark.parametrize("who", [0, 1, 2])
def test_an_error_of_one_rank_is_raised_by_all_at_once(gloo: Gloo, checkpoint: Path, who: int) -> None:
    results = gloo.run_ok(run_with, checkpoint, "raises", who, world_size=3)
    for text, failures, seconds in results:
        assert f"running the pipeline failed on rank {who} of 3: MemoryError: no room for the keys" in text
        assert set(failures) == {who}
        assert seconds < TIMEOUT / 2


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("dies", "no sign of life for"),
        ("freezes", "no sign of life for"),
        ("stalls", "it did not get there within"),
    ],
)
def test_a_lost_rank_is_named_in_time(gloo: Gloo, checkpoint: Path, what: str, said: str) -> None:
    results = gloo.run(run_with, checkpoint, what, 1, world_size=3, lost=[1])
    for text, failures, seconds in (results[0], results[2]):
        assert f"running the pipeline failed on rank 1 of 3: {said}" in text
        assert set(failures) == {1}
        assert seconds <= TIMEOUT + 2


def work_with(checkpoint: Path, work: str, who: int) -> tuple[str, float]:
    """Let a rank fail at other work than forward passes; tell its error, and how long it took."""
    stage, began = stage_of(checkpoint, timeout=TIMEOUT, materialize=True), time.monotonic()
    if dist.get_rank() == who:
        block = stage.shard.model.layers[stage.body.blocks[-1]]
        hook = block.mlp.register_full_backward_hook if work == "training" else block.register_forward_hook
        hook(_no_room)
    try:
        if work == "training":
            stage.train_step({"input_ids": IDS, "labels": IDS}, micro_batches=2)
        elif work == "scoring":
            stage.score([{"input_ids": IDS}] * 2)
        else:
            odd = IDS.flip(0) if dist.get_rank() == who else IDS
            stage.generate(odd, max_new_tokens=2, pad_token_id=0, micro_batches="auto")
    except CollectiveError as error:
        seconds = time.monotonic() - began
        assert (
            stage_of(checkpoint, timeout=TIMEOUT).generate(IDS, max_new_tokens=1, pad_token_id=0).shape[1]
            == 5
        )
        return str(error), seconds
    raise AssertionError(f"rank {dist.get_rank()} did not notice")


def _no_room(*_: Any) -> None:
    raise MemoryError("no room")


def tell_badly(checkpoint: Path, who: int) -> tuple[str, float]:
    """Score with a function that is told of batches, and that fails on one rank."""
    stage, began = stage_of(checkpoint, timeout=TIMEOUT), time.monotonic()
    with pytest.raises(CollectiveError) as caught:
        stage.score([{"input_ids": IDS}] * 3, progress=_no_room if dist.get_rank() == who else False)
    return str(caught.value), time.monotonic() - began


@pytest.mark.parametrize("who", [0, 1])
def test_who_fails_at_being_told_of_progress_is_named(gloo: Gloo, checkpoint: Path, who: int) -> None:
    for text, seconds in gloo.run_ok(tell_badly, checkpoint, who):
        assert f"scoring failed on rank {who} of 2: MemoryError: no room" in text
        assert seconds < TIMEOUT / 2


class Unheard(BaseStreamer):
    """Fails when all tokens are there."""

    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        raise MemoryError("no room")


@pytest.mark.parametrize(
    ("work", "who", "said"),
    [
        # the ranks before the last one wait for gradients, each of the one after it
        ("training", 2, "a training step failed on rank 2 of 3: MemoryError: no room"),
        # the first rank has done its part by then, and is already putting the scores together
        ("scoring", 1, "scoring failed on rank 1 of 3: MemoryError: no room"),
        # only the rank that was given something else knows; the first one is already measuring
        ("measuring", 1, "rank 1 was given other inputs than rank 0: input_ids differ"),
        ("measuring", 2, "rank 2 was given other inputs than rank 1: input_ids differ"),
    ],
)
def test_the_cause_is_told_at_once_wherever_the_other_ranks_are(
    gloo: Gloo, checkpoint: Path, work: str, who: int, said: str
) -> None:
    for text, seconds in gloo.run_ok(work_with, checkpoint, work, who, world_size=3):
        assert said in text
        assert seconds < TIMEOUT / 2


def fail_at_the_end(checkpoint: Path, work: str, owned: Owned) -> tuple[str, float]:
    """Let the first rank fail when the last one has nothing left to do; tell each one's error."""
    stage, is_first = stage_of(checkpoint, owned, timeout=TIMEOUT, materialize=True), dist.get_rank() == 0
    if is_first and work == "training":
        stage.shard.model.layers[0].mlp.register_full_backward_hook(_no_room)
    began = time.monotonic()
    try:
        if work == "training":
            stage.train_step({"input_ids": IDS, "labels": IDS})
        else:
            told = Unheard() if is_first else None
            stage.generate(IDS, max_new_tokens=2, pad_token_id=0, do_sample=False, streamer=told)
    except CollectiveError as error:
        return str(error), time.monotonic() - began
    raise AssertionError(f"rank {dist.get_rank()} did not notice")


@pytest.mark.parametrize("work", ["training", "generating"])
@pytest.mark.parametrize("owned", [[[0], [1, 2], [3]], [[0, 1], [], [2, 3]]])
def test_no_rank_goes_on_alone_where_the_first_one_fails_at_the_very_end(
    gloo: Gloo, checkpoint: Path, work: str, owned: Any
) -> None:
    for text, seconds in gloo.run_ok(fail_at_the_end, checkpoint, work, owned, world_size=3):
        assert "failed on rank 0 of 3: MemoryError: no room" in text
        assert seconds < TIMEOUT / 2


def run_out(checkpoint: Path) -> str:
    stage, nothing = stage_of(checkpoint, timeout=TIMEOUT, materialize=True), iter(())
    with pytest.raises(CollectiveError) as caught:
        stage.train_step({"input_ids": IDS}, lambda *_: next(nothing))
    return str(caught.value)


def test_an_iterator_that_ends_in_a_loss_is_an_error_like_any_other(gloo: Gloo, checkpoint: Path) -> None:
    one, other = gloo.run_ok(run_out, checkpoint)
    assert one == other
    assert "a training step failed on rank 1 of 2: StopIteration" in one


def run_alone(checkpoint: Path) -> None:
    stage = stage_of(checkpoint, timeout=TIMEOUT)
    if dist.get_rank() == 0:
        stage(IDS)
    else:
        time.sleep(TIMEOUT + 3)


def test_a_rank_that_never_calls_is_named(gloo: Gloo, checkpoint: Path) -> None:
    (failure, _) = gloo.run(run_alone, checkpoint, lost=[1])
    assert isinstance(failure, RankFailure)
    assert "rank 1 of 2: it did not get there within" in failure.text
    assert "do all ranks make this call?" in failure.text


def differ(checkpoint: Path, owned: Owned, how: str) -> None:
    stage, odd = stage_of(checkpoint, owned, timeout=TIMEOUT), dist.get_rank() == 1
    calls: dict[str, dict[str, Any]] = {
        "input_ids": {"input_ids": IDS.flip(0) if odd else IDS},
        "attention_mask": {"input_ids": IDS, "attention_mask": torch.ones(2, 4) if odd else None},
        "other arguments": {"input_ids": IDS, "micro_batches": 2 if odd else 1},
    }
    stage(**calls[how])


@pytest.mark.parametrize("how", ["input_ids", "attention_mask", "other arguments"])
@pytest.mark.parametrize("owned", [[[0], [1, 2], [3]], [[0, 1, 2], [], [3]]])
def test_inputs_that_differ_between_ranks_are_told(
    gloo: Gloo, checkpoint: Path, owned: Any, how: str
) -> None:
    results = gloo.run(differ, checkpoint, owned, how, world_size=3)
    assert {result.text for result in results} == {results[0].text}
    assert f"rank 1 was given other inputs than rank 0: {how} differ" in results[0].text


def not_in_order(checkpoint: Path, owned: Owned) -> None:
    stage_of(checkpoint, owned)


@pytest.mark.parametrize(
    ("owned", "said"),
    [
        ([[0, 2], [1, 3]], "rank 0: 0,2, rank 1: 1,3"),
        ([[2, 3], [0, 1]], "rank 0: 2-3, rank 1: 0-1"),
        ([[0, 1], [1, 2, 3]], "rank 0: 0-1, rank 1: 1-3"),
        ([[0, 1], [3]], "rank 0: 0-1, rank 1: 3"),
    ],
)
def test_ownership_that_is_no_pipeline_is_refused_by_name(
    gloo: Gloo, checkpoint: Path, owned: Any, said: str
) -> None:
    for result in gloo.run(not_in_order, checkpoint, owned):
        assert result.type == "OwnershipError"
        assert "a pipeline needs all 4 blocks once, in contiguous runs in the order of the" in result.text
        assert f"they own {said}" in result.text


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"inputs_embeds": torch.zeros(2, 4, 64)}, "inputs_embeds cannot be given"),
    ({"output_hidden_states": True}, "output_hidden_states would be that of one rank's blocks only"),
    ({"micro_batches": [1, 2]}, r"micro_batches are \[1, 2\], which are not the 2 rows of the batch"),
    ({"micro_batches": 0}, "cannot be cut into 0 micro-batches"),
    ({"input_ids": IDS[0]}, r"a tensor of token ids, \(batch, tokens\), not torch.int64 of shape \(4,\); a"),
    ({"input_ids": IDS.tolist()}, r"a tensor of token ids, \(batch, tokens\), not list; a tokenizer gives"),
    ({"input_ids": IDS.float()}, r"not torch.float32 of shape \(2, 4\)"),
    ({"input_ids": IDS[:0]}, r"not torch.int64 of shape \(0, 4\)"),
    *(
        ({"micro_batches": 2, name: DynamicCache()}, f"{name} cannot be cut into micro-batches")
        for name in CACHE_NAMES
    ),
    (
        {"micro_batches": 2, "attention_mask": torch.ones(1, 4)},
        r"attention_mask \(1, 4\) has 1 rows, but",
    ),
    (
        {"micro_batches": 2, "position_ids": IDS.repeat(2, 1)},
        r"position_ids \(4, 4\) has 4 rows, but",
    ),
    ({"micro_batches": 2, "labels": IDS}, "labels cannot be cut into micro-batches: pass micro_batches=1"),
]


def refuse(checkpoint: Path) -> list[str]:
    texts = []
    for arguments, _ in REFUSED:
        stage = stage_of(checkpoint)
        with pytest.raises((CollectiveError, ConfigError)) as caught:
            stage(**{"input_ids": IDS, **arguments})
        texts.append(str(caught.value))
    return texts


def test_what_no_stage_can_give_is_refused_and_a_new_stage_can_be_made(gloo: Gloo, checkpoint: Path) -> None:
    for texts in gloo.run_ok(refuse, checkpoint):
        for text, (_, said) in zip(texts, REFUSED, strict=True):
            assert re.search(said, text), text
