from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig, MoEConfig
from patchers.errors import ConfigError, OwnershipError
from sharded_ckpt.ownership.costs import MEASURES, ModelCosts, model_costs
from sharded_ckpt.ownership.counting import costs_of
from sharded_ckpt.ownership.partition import Run, even_partition, min_max_partition, min_max_runs
from sharded_ckpt.ownership.plan import (
    OwnershipPlan,
    check_disjoint_cover,
    check_ownership,
)
from sharded_ckpt.ownership.planning import plan_from_index, plan_ownership

CONFIGS = Path(__file__).parents[2] / "shared" / "configs"
TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "vocab_size": 10,
}


def all_partitions(costs: Sequence[float], runs: int) -> list[list[range]]:
    cuts = combinations(range(1, len(costs)), min(runs, len(costs)) - 1)
    return [[range(a, b) for a, b in pairwise([0, *cut, len(costs)])] for cut in cuts]


def worth(partition: list[range], costs: Sequence[int]) -> tuple[int, int, list[int]]:
    """What is to be small: the dearest run, then unevenness, then the shortness of earlier runs."""
    loads = [sum(costs[i] for i in run) for run in partition]
    return max(loads), sum(load * load for load in loads), [-len(run) for run in partition]


# The partition --------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 10))
def test_no_partition_is_better(costs: list[int], runs: int) -> None:
    best = min(all_partitions(costs, runs), key=lambda partition: worth(partition, costs))
    assert min_max_partition(costs, runs) == best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=8), st.integers(1, 4))
def test_floats_of_any_size_are_partitioned_exactly(costs: list[float], runs: int) -> None:
    exact = [Fraction(cost) for cost in costs]
    best = min(all_partitions(exact, runs), key=lambda partition: worth(partition, exact))
    assert min_max_partition(costs, runs) == best


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7),
    st.lists(st.tuples(st.integers(1, 3), st.none() | st.integers(1, 20)), min_size=1, max_size=4),
)
def test_no_partition_within_limits_is_better(
    row: list[tuple[int, int]], runs: list[tuple[int, int | None]]
) -> None:
    costs, sizes = [cost for cost, _ in row], [size for _, size in row]
    found: list[tuple[Any, list[range]]] = []
    for cuts in combinations_with_replacement(range(len(row) + 1), len(runs) - 1):
        partition = [range(a, b) for a, b in pairwise([0, *cuts, len(row)])]
        shares = [
            Fraction(sum(costs[i] for i in run), of) for run, (of, _) in zip(partition, runs, strict=True)
        ]
        taken = [sum(sizes[i] for i in run) for run in partition]
        if all(limit is None or size <= limit for size, (_, limit) in zip(taken, runs, strict=True)):
            empty, lengths = sum(not run for run in partition), [-len(run) for run in partition]
            found.append(((max(shares), sum(share**2 for share in shares), empty, lengths), partition))
    asked = [Run(share, limit) for share, limit in runs]
    if found:
        assert min_max_runs(costs, asked, sizes) == min(found)[1]
    else:
        with pytest.raises(OwnershipError, match="no cut of the row keeps all limits"):
            min_max_runs(costs, asked, sizes)


def test_an_even_partition_is_that_of_numpy() -> None:
    for count, runs in [(7, 3), (162, 16), (2, 4), (8, 8)]:
        parts = np.array_split(np.arange(count), runs)
        assert [list(run) for run in even_partition(count, runs)] == [part.tolist() for part in parts]


def test_many_blocks_over_many_ranks_are_planned_at_once() -> None:
    import time

    began = time.monotonic()
    plan = plan_ownership([1.0] * 1000, 64)
    assert [len(owned) for owned in plan.blocks] == [16] * 40 + [15] * 24
    assert time.monotonic() - began < 5


# Plans ----------------------------------------------------------------------------------------------------


def test_embedding_and_head_count_where_they_live() -> None:
    assert plan_ownership([1, 1, 1, 1], 2).blocks == ((0, 1), (2, 3))
    assert plan_ownership([1, 1, 1, 1], 2, first=2).blocks == ((0,), (1, 2, 3))
    assert plan_ownership([1, 1, 1, 1], 2, last=2).blocks == ((0, 1, 2), (3,))
    plan = plan_ownership([1, 1, 1, 1], 2, first=2, last=5)
    assert plan.blocks == ((0, 1, 2), (3,))
    assert plan.totals == (5, 6)
    assert plan.imbalance == 12 / 11


def test_ranks_beyond_the_blocks_own_nothing() -> None:
    plan = plan_ownership([3, 1], 4, last=1)
    assert plan.blocks == ((0,), (1,), (), ())
    assert plan.totals == (3, 2, 0, 0)
    assert plan.is_contiguous
    assert plan.world_size == 4


def test_a_plan_answers_questions() -> None:
    plan = OwnershipPlan(((0, 2), (1, 3)), (1, 2, 3, 4), first=10, last=20)
    assert plan.totals == (14, 26)
    assert not plan.is_contiguous
    assert [plan.owner_of(block) for block in range(4)] == [0, 1, 0, 1]
    with pytest.raises(OwnershipError, match="block has 4; this model has blocks 0-3"):
        plan.owner_of(4)
    with pytest.raises(OwnershipError, match="block has -1; "):
        plan.owner_of(-1)
    assert OwnershipPlan(((0,), ()), (0,)).imbalance == 1.0


def test_a_plan_is_a_table() -> None:
    plan = plan_ownership([4e9, 1e9, 1e9, 1e9], 3, first=1e9, last=5e8)
    assert str(plan) == "\n".join(
        [
            "4 blocks over 3 ranks by bytes: the largest rank has 1.76x the mean",
            "rank  blocks  number  bytes    of mean  and",
            "0     0       1       5.00 GB  1.76x    embedding",
            "1     1-2     2       2.00 GB  0.71x",
            "2     3       1       1.50 GB  0.53x    head",
        ]
    )
    table = plan._repr_html_()
    assert table.count("<tr>") == 4
    assert "<td>5.00 GB</td>" in table
    assert "<caption>4 blocks over 3 ranks by bytes: the largest rank has 1.76x the mean</caption>" in table
    assert "0     -       0       0      -" in str(OwnershipPlan(((), (0,)), (0,), by="count"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([], 2), "there are no blocks to own: costs is empty"),
        (([1], 0), "world_size is 0; it must be a positive int"),
        (([1], 1.5), "world_size is 1.5; it must be a positive int"),
        (([1, -1], 2), r"costs\[1\] is -1; a cost is a finite number that is not negative"),
        (([1, float("nan")], 2), r"costs\[1\] is nan; "),
    ],
)
def test_impossible_plans_are_refused(arguments: Any, text: str) -> None:
    with pytest.raises(OwnershipError, match=text):
        plan_ownership(*arguments)


def test_a_checkpoint_is_planned_from_its_keys() -> None:
    keys = {f"model.layers.{i}.mlp.up_proj.weight": 100 * (i + 1) for i in range(4)}
    ends = {"model.embed_tokens.weight": 400, "model.norm.weight": 1}
    tied = plan_from_index(keys | ends, 4, 2)
    assert (tied.costs, tied.first, tied.last) == ((100, 200, 300, 400), 400, 401)
    untied = plan_from_index(keys | ends | {"lm_head.weight": 400}, 4, 2)
    assert (untied.first, untied.last) == (400, 401)
    assert plan_from_index(keys | ends, 4, 2, tied=False).last == 1
    neox = {"gpt_neox.layers.0.x.weight": 1, "gpt_neox.embed_in.weight": 5, "embed_out.weight": 7}
    assert (plan_from_index(neox, 1, 1).first, plan_from_index(neox, 1, 1).last) == (5, 7)
    with pytest.raises(OwnershipError, match="is of block 3, but the model has 3 blocks"):
        plan_from_index(keys, 3, 2)


# Budgets --------------------------------------------------------------------------------------------------


def test_unequal_devices_are_filled_to_the_same_percentage() -> None:
    plan = plan_ownership([1e9] * 12, 3, budgets=["4GB", "12 GB", 8e9])
    assert plan.blocks == ((0, 1), tuple(range(2, 8)), tuple(range(8, 12)))
    assert str(plan).splitlines()[1:3] == [
        "rank  blocks  number  bytes    of mean  of budget  free     and",
        "0     0-1     2       2.00 GB  0.50x    50%        2.00 GB",
    ]


def test_time_is_shared_out_within_the_memory_of_each_rank() -> None:
    seconds = ModelCosts((3.0, 1.0, 1.0, 1.0), by="seconds")
    sizes = ModelCosts((1, 4, 4, 4), everywhere=2)
    assert plan_ownership(seconds, 2).blocks == ((0,), (1, 2, 3))
    plan = plan_ownership(seconds, 2, memory=sizes, budgets=11)
    assert plan.blocks == ((0, 1), (2, 3))
    assert (plan.totals, plan.taken) == ((4.0, 2.0), (7, 10))
    assert str(plan).splitlines()[1] == (
        "rank  blocks  number  seconds  of mean  bytes  of budget  free  and"
    )


def test_a_device_too_small_for_any_block_owns_nothing() -> None:
    assert plan_ownership([5, 5], 3, budgets=[1, 6, 6]).blocks == ((), (0,), (1,))


@pytest.mark.parametrize(
    ("costs", "budgets", "text"),
    [
        (
            ModelCosts((4e9, 3e9, 4e9)),
            5e9,
            "the model does not fit: it takes 11.00 GB and 2 ranks may take 10.00 GB; in the split that "
            "comes closest, rank 0 (blocks 0-1) takes 7.00 GB of its 5.00 GB, 2.00 GB too much; it fits "
            "on 3 ranks with 5.00 GB each",
        ),
        (
            ModelCosts((4e9, 3e9), 2e9, everywhere=1e9),
            "6.5 GB",
            "rank 0 (block 0) takes 7.00 GB of its 6.50 GB, 500.00 MB too much; no number of ranks helps: "
            "block 0, with what lives beside it, takes 7.00 GB by itself",
        ),
        (
            ModelCosts((1, 1), everywhere=10),
            10,
            "what every rank has takes 10 B, and a rank may take 10 B; allow more than 10 B",
        ),
    ],
)
def test_what_does_not_fit_is_told_by_how_much(costs: ModelCosts, budgets: Any, text: str) -> None:
    with pytest.raises(OwnershipError) as failure:
        plan_ownership(costs, 2, budgets=budgets)
    assert text in str(failure.value)


def test_an_even_split_is_shown_even_where_it_does_not_fit() -> None:
    plan = plan_ownership([3, 1, 1, 1], 2, budgets=3.5, split="even")
    assert plan.blocks == ((0, 1), (2, 3))
    assert "4    1.33x    114%       -0.5" in str(plan).replace(" B", "")


@pytest.mark.parametrize(
    ("budgets", "text"),
    [
        ("80 boxes", 'budget \'80 boxes\' is no size; write "80GiB", "80 GB" or a number'),
        (["1GB"], "budgets has 1 entries for 2 ranks; give one, or one for each rank"),
        (0, "budget 0 is not a positive, finite amount"),
        (float("nan"), "budget nan is not a positive, finite amount"),
    ],
)
def test_budgets_that_say_nothing_are_refused(budgets: Any, text: str) -> None:
    with pytest.raises(OwnershipError) as failure:
        plan_ownership([1, 1], 2, budgets=budgets)
    assert str(failure.value) == text


# Explicit assignments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "owned",
    [{1, 3}, [3, 1], (np.int64(1), 3), np.array([1, 3]), (i for i in (1, 3)), {1: "a", 3: "b"}.keys()],
)
def test_any_iterable_of_integers_is_an_ownership(owned: Any) -> None:
    found = check_ownership(owned, 4)
    assert found == {1, 3}
    assert {type(index) for index in found} == {int}


def test_a_rank_may_own_nothing() -> None:
    assert check_ownership(set(), 4) == set()


@pytest.mark.parametrize(
    ("owned", "text"),
    [
        ({0, 99}, "owned_block_indexes has 99; this model has blocks 0-3"),
        ({-1, 0, 4}, "owned_block_indexes has -1, 4; this model has blocks 0-3"),
        ([0, 1, 1, 2, 2], "owned_block_indexes has 1-2 more than once"),
        ({True}, "owned_block_indexes has True; block indexes are ints"),
        ([np.bool_(True)], "owned_block_indexes has .*True_?; block indexes are ints"),
        ([1.0], r"owned_block_indexes has 1\.0; block indexes are ints"),
        (["1"], "owned_block_indexes has '1'; block indexes are ints"),
        ("12", "owned_block_indexes is '12'; it must be a set of ints"),
        (3, "owned_block_indexes is 3; it must be a set of ints"),
        (None, "owned_block_indexes is None; it must be a set of ints"),
    ],
)
def test_an_impossible_ownership_names_what_is_wrong(owned: Any, text: str) -> None:
    with pytest.raises(OwnershipError, match=text):
        check_ownership(owned, 4)


def test_every_block_has_exactly_one_owner() -> None:
    check_disjoint_cover([{0, 3}, set(), {1, 2}], 4)
    with pytest.raises(OwnershipError) as failure:
        check_disjoint_cover([{0, 1, 2}, {2, 5}, {1, 2}], 7)
    assert str(failure.value) == (
        "every block must be owned by exactly one rank, but block 1 is owned by ranks 0,2; "
        "block 2 is owned by ranks 0-2; blocks 3-4,6 are owned by no rank"
    )
    with pytest.raises(OwnershipError, match="the ownership of rank 1 has 9; this model has blocks 0-1"):
        check_disjoint_cover([{0, 1}, {9}], 2)
    with pytest.raises(OwnershipError, match="block 1 is owned by no rank"):
        OwnershipPlan(((0,),), (1, 1))


# Costs ----------------------------------------------------------------------------------------------------


def test_parameters_are_counted_part_by_part() -> None:
    whole, linear = BlockConfig(), FFNConfig(replace_with_linear=True)
    attention, ffn = 2 * 8 * 4 * (2 + 1), 3 * 8 * 16
    cases = {
        whole: attention + ffn + 16,
        BlockConfig(AttentionConfig(no_op=True)): ffn + 8,
        BlockConfig(ffn=FFNConfig(no_op=True)): attention + 8,
        BlockConfig(AttentionConfig(replace_with_linear=True), linear): 64 + 64 + 16,
        BlockConfig(AttentionConfig(no_op=True), FFNConfig(no_op=True)): 0,
        BlockConfig(AttentionConfig(2), FFNConfig(32)): 2 * 8 * 4 * 4 + 3 * 8 * 32 + 16,
        BlockConfig(ffn=FFNConfig(moe=MoEConfig(4, 2, 5, 3))): attention + 8 * (3 * (4 * 5 + 3) + 4) + 16,
    }
    costs = model_costs(list(cases), TINY, by="parameters")
    assert costs.blocks == tuple(cases.values())
    assert (costs.embedding, costs.head) == (80, 88)
    biased = model_costs([whole], TINY | {"attention_bias": True, "mlp_bias": True}, by="parameters")
    assert biased.blocks == (attention + ffn + 16 + (2 + 2) * 4 + 8 + 32 + 8,)


def test_an_explicit_head_dim_is_respected() -> None:
    costs = model_costs([BlockConfig()], TINY | {"head_dim": 16}, by="bytes+kv", batch=3, length=5)
    weights = 2 * 8 * 16 * (2 + 1) + 3 * 8 * 16 + 16
    assert costs.blocks == (2 * (weights + 3 * 5 * 2 * 1 * 16),)


def test_measures_count_what_they_say() -> None:
    blocks = [BlockConfig(), BlockConfig(AttentionConfig(no_op=True), FFNConfig(moe=MoEConfig(8, 2, 4, 0)))]
    costs = {by: model_costs(blocks, TINY, by=by, dtype_bytes=4, batch=2, length=10) for by in MEASURES}
    attention, ffn, moe = 192, 384, 8 * (3 * 2 * 4 + 8)
    assert costs["count"].blocks == (1, 1)
    assert (costs["count"].embedding, costs["count"].head) == (0, 0)
    assert costs["bytes"].blocks == tuple(4 * cost for cost in costs["parameters"].blocks)
    assert costs["bytes+kv"].blocks[0] - costs["bytes"].blocks[0] == 4 * 2 * 10 * 2 * 4
    assert costs["bytes+kv"].blocks[1] == costs["bytes"].blocks[1]
    assert costs["flops"].blocks == (2 * 20 * (attention + ffn + 10 * 8), 2 * 20 * moe)
    assert (costs["flops"].embedding, costs["flops"].head) == (0, 2 * 20 * 80)
    assert plan_ownership(costs["flops"], 2).by == "flops"


def test_costs_that_cannot_be_known_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="costs cannot be counted by 'time'; choose one of bytes, parameters"
    ):
        model_costs([BlockConfig()], TINY, by="time")
    with pytest.raises(ConfigError, match="the base config does not say vocab_size, which is needed"):
        model_costs([BlockConfig()], TINY | {"vocab_size": None})


@pytest.mark.parametrize(
    ("name", "parameters", "even", "best"),
    [
        ("llama-3_1-nemotron-ultra-253b-v1", 253_401_268_224, (118e9, 1.87), (71e9, 1.12)),
        ("llama-3_3-nemotron-super-49b-v1", 49_867_145_216, (18e9, 1.42), (13e9, 1.05)),
    ],
)
def test_published_models_fit_where_an_even_split_does_not(
    name: str, parameters: int, even: tuple[float, float], best: tuple[float, float]
) -> None:
    file = CONFIGS / f"{name}.config.json"
    if not file.exists():
        pytest.skip("the published configs are not beside this checkout")
    config = json.loads(file.read_text())
    assert costs_of(config, by="parameters").total == parameters
    plans = {split: plan_ownership(config, 8, split=split) for split in ("even", "min-max")}
    for plan, (largest, imbalance) in ((plans["even"], even), (plans["min-max"], best)):
        assert max(plan.totals) == pytest.approx(largest, rel=0.03)
        assert plan.imbalance == pytest.approx(imbalance, abs=0.005)
