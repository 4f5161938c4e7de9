"""Generating over ranks gives the tokens of `model.generate` in one process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.gloo import Gloo
from support.pipelines import generated, stage_of
from support.tiny import heterogeneous_checkpoint, tiny_checkpoint
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
)
from transformers.generation import BaseStreamer

from patchers.cache_names import CACHE_NAMES
from patchers.errors import CollectiveError, ConfigError
from sharded_ckpt import PipelineStage, Runtime, load_and_shard_model
from sharded_ckpt.demo.tiny import tiny_folder

GOLDEN = Path(__file__).parent / "data" / "golden"
PROMPTS = torch.randint(4, 128, (4, 7), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 7, [0] * 4 + [1] * 3, [0] + [1] * 6, [1] * 7])
PADDED = {"inputs": PROMPTS * MASK, "attention_mask": MASK, "pad_token_id": 0}
GREEDY = PADDED | {"do_sample": False}
SAMPLED = PADDED | {"do_sample": True}
ENDS = list(range(4, 40))  # so many end tokens that rows end early, and whole micro-batches


def two_of_its_own(row: int, _: torch.Tensor) -> list[int]:
    """The tokens that a row may have."""
    return [10 + row, 30 + row]


# What `generate` is asked, and how the pipeline is to go about it.
CALLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (GREEDY | {"max_new_tokens": 8}, {"micro_batches": 2}),
    (GREEDY | {"max_new_tokens": 8, "eos_token_id": None}, {"micro_batches": [1, 3]}),
    (GREEDY | {"max_new_tokens": 12, "eos_token_id": ENDS}, {"micro_batches": 4}),
    (SAMPLED | {"max_new_tokens": 6, "temperature": 0.7, "top_k": 20, "manual_seed": 3}, {}),
    (SAMPLED | {"max_new_tokens": 9, "top_p": 0.8, "eos_token_id": ENDS}, {"micro_batches": 3}),
    (GREEDY | {"max_length": 12, "min_new_tokens": 3, "repetition_penalty": 1.3}, {"micro_batches": 2}),
    (GREEDY | {"max_new_tokens": 5, "prefill_chunk_size": 3}, {"micro_batches": 2}),
    (GREEDY | {"max_new_tokens": 5, "use_cache": False}, {"micro_batches": 3}),
    (
        SAMPLED
        | {"inputs": PROMPTS[:1], "attention_mask": None, "max_new_tokens": 4, "num_return_sequences": 3},
        {"micro_batches": 2},
    ),
    ({"inputs": PROMPTS, "generation_config": GenerationConfig(max_new_tokens=4, pad_token_id=0)}, {}),
    (GREEDY | {"max_new_tokens": 6, "prefix_allowed_tokens_fn": two_of_its_own}, {"micro_batches": [3, 1]}),
    (GREEDY | {"max_new_tokens": 6, "cache_implementation": "static"}, {"micro_batches": 2}),
    (GREEDY | {"max_new_tokens": 4}, {"micro_batches": "auto"}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


def expected(checkpoint: Path) -> list[torch.Tensor]:
    model = load_and_shard_model("auto", checkpoint, dtype=torch.float32)
    tokens = []
    for call, _ in CALLS:
        options = dict(call)
        torch.manual_seed(options.pop("manual_seed", 0))
        tokens.append(model.generate(**options))
    return tokens


@pytest.mark.parametrize(
    ("world_size", "owned"), [(1, None), (2, None), (5, [[0, 1], [2, 3, 4], [], [5], [6]])]
)
def test_tokens_are_those_of_one_process_on_every_rank(
    gloo: Gloo, folder: Path, world_size: int, owned: Any
) -> None:
    checkpoint = heterogeneous_checkpoint(folder)
    calls = [call | cut for call, cut in CALLS]
    ranks = gloo.run_ok(generated, checkpoint, owned, calls, world_size=world_size)
    for number, tokens in enumerate(expected(checkpoint)):
        for rank in ranks:
            assert torch.equal(rank[number], tokens), CALLS[number]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", sorted(folder.name for folder in GOLDEN.iterdir()))
def test_recorded_checkpoints_decode_to_their_recorded_tokens(gloo: Gloo, name: str, world_size: int) -> None:
    recorded = load_file(GOLDEN / name / "reference.safetensors")
    tokens = recorded["greedy_tokens"]
    prompt = tokens[:, : recorded["input_ids"].shape[1]]
    new = tokens.shape[1] - prompt.shape[1]
    call = {"inputs": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": new}
    call |= {"do_sample": False, "eos_token_id": None, "micro_batches": 2}
    for rank in gloo.run_ok(generated, GOLDEN / name / "checkpoint", None, [call], world_size=world_size):
        assert torch.equal(rank[0], tokens)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 2}, "greedily or by sampling; beam_search was asked for"),
    (
        {"return_dict_in_generate": True, "output_logits": True},
        "output_logits cannot be given by a pipeline's",
    ),
    *(
        ({name: DynamicCache()}, f"{name} cannot be given to a pipeline's generate: it makes")
        for name in CACHE_NAMES
    ),
    ({"use_cache": False, "prefill_chunk_size": 2}, "only with a cache"),
    ({"max_new_token": 3}, "max_new_token"),
    ({"token_healing": True}, "a pipeline heals no tokens"),
    ({"cache_implementation": "paged"}, "a pipeline has no paged cache"),
    ({"guidance_scale": 1.5}, "guidance_scale cannot be given to a pipeline's generate: it runs the whole"),
    ({"num_return_sequences": 2, "do_sample": False}, "greedily, num_return_sequences would all be the same"),
    ({"inputs": PROMPTS.tolist()}, "input_ids must be a tensor of token ids, (batch, tokens), not list"),
]


def refuse(checkpoint: Path) -> list[str]:
    texts = []
    for options, _ in REFUSED:
        with pytest.raises((CollectiveError, ConfigError)) as caught:
            stage_of(checkpoint).generate(**{"inputs": PROMPTS, "max_new_tokens": 3, **options})
        texts.append(str(caught.value))
    return texts


def test_what_a_tokenizer_returns_can_be_given_as_it_is(folder: Path) -> None:
    stage = PipelineStage(load_and_shard_model("auto", heterogeneous_checkpoint(folder)))
    options = {"attention_mask": torch.ones_like(PROMPTS), "max_new_tokens": 3, "do_sample": False}
    tokens = stage.generate(PROMPTS, **options)
    assert torch.equal(stage.generate(input_ids=PROMPTS, **options), tokens)
    for both_or_none in ({"inputs": PROMPTS, "input_ids": PROMPTS}, {}):
        with pytest.raises(
            ConfigError, match=r"^generate takes prompts as its first argument or as input_ids"
        ):
            stage.generate(**both_or_none, **options)


def test_what_a_pipeline_does_not_generate_is_refused_by_all_ranks(gloo: Gloo, folder: Path) -> None:
    for texts in gloo.run_ok(refuse, heterogeneous_checkpoint(folder)):
        for text, (_, said) in zip(texts, REFUSED, strict=True):
            assert said in text


def test_end_tokens_may_be_a_tensor_of_as_many_as_there_are_rows(gloo: Gloo, folder: Path) -> None:
    checkpoint = heterogeneous_checkpoint(folder)
    model = load_and_shard_model("auto", checkpoint, dtype=torch.float32)
    free = model.generate(**GREEDY, max_new_tokens=4, eos_token_id=None)
    call = GREEDY | {"max_new_tokens": 9, "eos_token_id": free[:, -1].roll(1)}  # each row's end is another's
    expected = model.generate(**call)
    assert expected.shape == free.shape  # all rows have ended
    for cut in (2, 4, [1, 3]):
        for rank in gloo.run_ok(generated, checkpoint, None, [call | {"micro_batches": cut}]):
            assert torch.equal(rank[0], expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompts_are_run_in_chunks_into_a_static_cache(gloo: Gloo, folder: Path, family: str) -> None:
    window = {"sliding_window": 4} if family == "mistral" else {}
    checkpoint = tiny_checkpoint(folder, family, **window)
    call = GREEDY | {"max_new_tokens": 5, "prefill_chunk_size": 3, "cache_implementation": "static"}
    expected = load_and_shard_model("auto", checkpoint, dtype=torch.float32).generate(**call)
    for rank in gloo.run_ok(generated, checkpoint, None, [call, call | {"micro_batches": 2}]):
        assert all(torch.equal(tokens, expected) for tokens in rank)


class UntilCalledOff(StoppingCriteria):
    """A criterion that another thread may fulfil; counts how often it is asked."""

    def __init__(self) -> None:
        self.called_off, self.asked = threading.Event(), 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.asked += 1
        return torch.full(input_ids.shape[:1], self.called_off.is_set())


def call_off(checkpoint: Path) -> tuple[int, str]:
    until = UntilCalledOff()
    options = GREEDY | {"max_new_tokens": 3, "eos_token_id": None, "stopping_criteria": [until]}
    stage_of(checkpoint).generate(**options)
    with pytest.raises(CollectiveError) as caught:
        stage_of(checkpoint).generate(**options, micro_batches=2)
    return until.asked, str(caught.value)


def test_ones_own_criterion_is_asked_itself_where_there_is_one_micro_batch(gloo: Gloo, folder: Path) -> None:
    ranks = gloo.run_ok(call_off, heterogeneous_checkpoint(folder))
    assert [asked for asked, _ in ranks] == [0, 3]
    for _, text in ranks:
        assert "stopping_criteria cannot be copied, and each micro-batch needs its own (TypeError" in text
        assert "pass micro_batches=1" in text


class Ends(LogitsProcessor):
    """A processor of one's own: from the third new token on, row by row, only the end token is possible."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > PROMPTS.shape[1] + 1:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, 2] = 0.0
        return scores


class Told(BaseStreamer):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.said.append(value.flatten().tolist())

    def end(self) -> None:
        self.said.append([])


def stream(checkpoint: Path, micro_batches: int) -> tuple[torch.Tensor, list[list[int]]]:
    stage, told = stage_of(checkpoint), Told()
    tokens = stage.generate(
        PROMPTS,
        attention_mask=torch.ones_like(PROMPTS),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([Ends()]),
        micro_batches=micro_batches,
        streamer=told if dist.get_rank() != 1 else None,
    )
    return tokens, told.said


def test_ones_own_processors_and_streamers_are_used(gloo: Gloo, folder: Path) -> None:
    ranks = gloo.run_ok(stream, heterogeneous_checkpoint(folder), 2, world_size=3)
    tokens, said = ranks[0]
    new = tokens[:, PROMPTS.shape[1] :]
    assert new.shape[1] == 3
    assert set(new[:, 2].tolist()) == {2}
    assert said == [PROMPTS.flatten().tolist(), *new.T.tolist(), []] == ranks[2][1]
    assert ranks[1][1] == []


def stop(folder: Path, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what one process makes, and what the ranks make, with a stop string."""
    options = {"max_new_tokens": 20, "do_sample": False, "stop_strings": [text], "eos_token_id": None}
    options |= {
        "tokenizer": AutoTokenizer.from_pretrained(folder),
        "attention_mask": torch.ones_like(PROMPTS),
    }
    whole = load_and_shard_model("auto", folder, {*range(8)}, runtime=Runtime(torch.device("cpu")))
    stage = stage_of(folder)
    return whole.float().generate(PROMPTS, **options), stage.generate(PROMPTS, micro_batches=4, **options)


def test_stop_strings_end_rows_where_one_process_ends_them(gloo: Gloo, folder: Path) -> None:
    model = tiny_folder(folder / "with-tokenizer")
    free = load_and_shard_model("auto", model, dtype=torch.float32).generate(
        PROMPTS,
        attention_mask=torch.ones_like(PROMPTS),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
    )
    text = AutoTokenizer.from_pretrained(model).decode(free[1, 9:10])
    for alone, together in gloo.run_ok(stop, model, text):
        assert torch.equal(alone, together)
