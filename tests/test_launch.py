"""`run_on_ranks`: from a notebook, what torchrun is to a shell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import launched
from support.tiny import heterogeneous_checkpoint

from sharded_ckpt import CollectiveError, ConfigError, load_and_shard_model, run_on_ranks
from sharded_ckpt.local_ranks import on_ranks

PROMPT = [[1, 5, 7, 9]]


def test_the_tokens_of_a_pipeline_of_launched_ranks_are_those_of_the_model(tmp_path: Path) -> None:
    checkpoint = heterogeneous_checkpoint(tmp_path)
    results = run_on_ranks(launched.generate, checkpoint, PROMPT, ranks=2, timeout=120)
    model = load_and_shard_model("auto", checkpoint)
    tokens = model.generate(torch.tensor(PROMPT), max_new_tokens=4, do_sample=False)
    assert [result["tokens"] for result in results] == [tokens.tolist()] * 2
    assert sum((result["blocks"] for result in results), ()) == tuple(range(model.config.num_hidden_layers))


def test_a_failing_rank_is_named_with_its_error_and_ends_the_others() -> None:
    with pytest.raises(CollectiveError, match=r"^rank 1 of 2 failed: ValueError: no such block on rank 1$"):
        run_on_ranks(launched.fail_on_rank_1, ranks=2, timeout=120)


def test_a_function_that_no_other_process_can_import_is_refused_with_what_to_do() -> None:
    said = (
        r"<lambda> cannot run on ranks: each is a process of its own that imports the function by its name, "
        r"and this one is not in a file\. Write it to one \(in a notebook: %%writefile my_work\.py\) and "
    )
    with pytest.raises(ConfigError, match=said):
        run_on_ranks(lambda: None)


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^ranks=0: expected 1 or more$"):
        run_on_ranks(launched.fail_on_rank_1, ranks=0)


def test_no_rank_begins_and_none_can_be_gone_before_all_are_connected() -> None:
    ranks = on_ranks(launched.connected_and_begun, [], world_size=2, timeout=120)
    assert min(begun for _, begun in ranks) >= max(connected for connected, _ in ranks)


def test_tensors_that_ranks_return_outlive_them() -> None:
    results = run_on_ranks(launched.tensors_of_rank, ranks=2, timeout=120)
    for rank, result in enumerate(results):
        assert torch.equal(result["rank"], torch.full((1000,), rank))
        assert [tensor.tolist() for tensor in result["ties"]] == [[0.0, 1.0, 2.0]] * 2
