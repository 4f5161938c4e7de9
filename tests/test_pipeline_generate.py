"""Generating over ranks gives the tokens of `model.generate` in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.gloo import Gloo
from support.pipelines import generated
from support.tiny import heterogeneous_checkpoint
from transformers import GenerationConfig

from sharded_ckpt import load_and_shard_model

GOLDEN = Path(__file__).parent / "data" / "golden"
PROMPTS = torch.randint(4, 128, (4, 7), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 7, [0] * 4 + [1] * 3, [0] + [1] * 6, [1] * 7])
PADDED = {"inputs": PROMPTS * MASK, "attention_mask": MASK, "pad_token_id": 0}
GREEDY = PADDED | {"do_sample": False}
SAMPLED = PADDED | {"do_sample": True}
ENDS = list(range(4, 40))  # so many end tokens that rows end early, and whole micro-batches

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
    ("world_size", "owned"), [(1, None), (2, None), (4, [[0, 1], [2], [], [3, 4, 5, 6]])]
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
