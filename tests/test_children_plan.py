"""What a child will be made of is decided from names and shapes alone; the impossible is refused by name."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.tiny import BLOCKS, Block, block_shapes, tiny_config

from patchers import AttentionConfig, BlockConfig, FFNConfig, ModelDescriptor, MoEConfig
from patchers.errors import BlockConfigError, CheckpointError, ConfigError, FamilyError
from sharded_ckpt.checkpoint.entry import TensorEntry, nbytes_of
from sharded_ckpt.children import ChildPlan, Indexes, Scores
from sharded_ckpt.children.attention import Heads, filled_up
from sharded_ckpt.children.choices import Rules
from sharded_ckpt.children.parent import Parent
from sharded_ckpt.children.plan import plan_child
from sharded_ckpt.children.recipes import (
    Copy,
    LargestNorm,
    MeanOfHeads,
    Product,
    Recipe,
    TakeColumns,
    TakeRows,
    Units,
)

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
MODULES = ["attention", "choices", "recipes", "rows", "memory"]


def entries(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, TensorEntry]:
    made, begin = {}, 96
    for key, shape in shapes.items():
        end = begin + nbytes_of(dtype, shape)
        made[key], begin = TensorEntry(dtype, shape, begin, end), end
    return made


def parent_of(
    blocks: list[Block] | None = None,
    family: str = "llama",
    extra: Mapping[str, tuple[int, ...]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    **config: Any,
) -> Parent:
    blocks = blocks or [(4, 96), (4, 96)]
    base = tiny_config(family, layers=len(blocks), **{**SIZES, **config})
    tensors = entries({**block_shapes(base, blocks), **(extra or {})})
    for key, dtype in (dtypes or {}).items():
        tensors[key] = tensors[key]._replace(dtype=dtype)
    said = None if set(blocks) == {(4, 96)} else [_said(*block) for block in blocks]
    raw = base.to_dict() | ({} if said is None else {"block_configs": said})
    return Parent.of("the parent", tensors, raw, ModelDescriptor.from_family(family))


def _said(attention: int | str, ffn: int | str) -> dict[str, Any]:
    def part(field: str, value: int | str) -> dict[str, Any]:
        size = None if isinstance(value, str) else value
        return {field: size, "no_op": value == "no_op", "replace_with_linear": value == "linear"}

    return {"attention": part("num_key_value_heads", attention), "ffn": part("intermediate_size", ffn)}


def block_of(plan: ChildPlan, index: int) -> dict[str, Recipe]:
    prefix = f"model.layers.{index}."
    return {recipe.key.removeprefix(prefix): recipe for recipe in plan.units[index + 1]}


def test_what_does_not_change_is_copied() -> None:
    parent = parent_of()
    plan = plan_child(parent, [BlockConfig(), BlockConfig(AttentionConfig(4), FFNConfig(96))])
    assert {type(recipe) for recipe in plan.recipes} == {Copy}
    assert {recipe.key: recipe.shape for recipe in plan.recipes} == {
        key: source.shape for key, source in parent.tensors.items()
    }
    assert all(recipe.sources == (recipe.key,) and not recipe.computed for recipe in plan.recipes)
    assert plan.nbytes == sum(source.entry.nbytes for source in parent.tensors.values())


def test_a_narrower_ffn_takes_rows_and_columns() -> None:
    block = block_of(plan_child(parent_of(), {1: BlockConfig(ffn=FFNConfig(40))}), 1)
    prefix = "model.layers.1.mlp."
    gate, up, down = (f"{prefix}{name}_proj.weight" for name in ("gate", "up", "down"))
    norm = LargestNorm((gate, up), (down,), 40)
    assert block["mlp.gate_proj.weight"] == TakeRows(gate, "BF16", (40, 64), gate, norm)
    assert block["mlp.up_proj.weight"] == TakeRows(up, "BF16", (40, 64), up, norm)
    assert block["mlp.down_proj.weight"] == TakeColumns(down, "BF16", (64, 40), down, norm)
    assert block["mlp.down_proj.weight"].sources == (down, gate, up)
    assert {type(r) for name, r in block.items() if not name.startswith("mlp.")} == {Copy}


def test_channels_are_kept_by_scores_by_index_or_from_the_front() -> None:
    scores = torch.arange(96.0) % 5
    for choice, kept in (
        (Scores(scores), (4, 9, 14)),
        (Scores(scores.tolist()), (4, 9, 14)),
        (Indexes([7, 3, 5]), (3, 5, 7)),
        (Indexes(torch.tensor([7, 3, 5])), (3, 5, 7)),
        ("first", range(3)),
    ):
        plan = plan_child(parent_of(), {0: BlockConfig(ffn=FFNConfig(3))}, Rules(ffn_channels={0: choice}))
        recipe = block_of(plan, 0)["mlp.up_proj.weight"]
        assert isinstance(recipe, TakeRows)
        assert recipe.rows == Units(kept)
        assert recipe.sources == ("model.layers.0.mlp.up_proj.weight",)


def test_fewer_kv_heads_are_means_or_some_of_the_parents() -> None:
    asked = {0: BlockConfig(AttentionConfig(2)), 1: BlockConfig(AttentionConfig(2))}
    plan = plan_child(parent_of(family="qwen3"), asked, Rules(kv_heads=["mean", Indexes([3, 1])]))
    mean, kept = block_of(plan, 0), block_of(plan, 1)
    key = "model.layers.0.self_attn.k_proj.weight"
    assert mean["self_attn.k_proj.weight"] == MeanOfHeads(key, "BF16", (16, 64), key, 2, 8)
    assert {type(mean[f"self_attn.{name}.weight"]) for name in ("q_proj", "o_proj", "q_norm")} == {Copy}
    key, query, output = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "kqo")
    order = (2, 3, 0, 1, 6, 7, 4, 5)
    assert kept["self_attn.k_proj.weight"] == TakeRows(key, "BF16", (16, 64), key, Units((1, 3), 8))
    assert kept["self_attn.q_proj.weight"] == TakeRows(query, "BF16", (64, 64), query, Units(order, 8))
    columns = Units(order, 8, zeroed=(2, 3, 6, 7))
    assert kept["self_attn.o_proj.weight"] == TakeColumns(output, "BF16", (64, 64), output, columns)
    assert isinstance(kept["self_attn.k_norm.weight"], Copy)


@pytest.mark.parametrize(("queries", "had"), [(8, 4), (8, 8), (12, 6), (12, 12), (16, 2), (24, 12)])
def test_every_query_head_in_use_keeps_its_kv_head(queries: int, had: int) -> None:
    for keep in (keep for keep in range(1, had) if queries % keep == 0):
        for kept in (range(keep), range(had - keep, had), sorted({i * had // keep for i in range(keep)})):
            heads = Heads(queries, had, keep, head_dim=1)
            group = queries // had
            order, idle = filled_up([range(i * group, (i + 1) * group) for i in kept], heads)
            assert sorted(order) == list(range(queries))
            for place, head in enumerate(order):
                of_parent, of_child = head // (queries // had), kept[place // (queries // keep)]
                assert (of_parent == of_child) is (place not in idle)
            assert len(idle) == queries - keep * (queries // had)


def test_linear_parts_are_products_and_keep_their_norms() -> None:
    linear = BlockConfig(AttentionConfig(replace_with_linear=True), FFNConfig(replace_with_linear=True))
    block = block_of(plan_child(parent_of(), {0: linear}), 0)
    prefix = "model.layers.0"
    o, v = (f"{prefix}.self_attn.{name}_proj.weight" for name in "ov")
    down, up = (f"{prefix}.mlp.{name}_proj.weight" for name in ("down", "up"))
    attention, ffn = f"{prefix}.self_attn.linear_attn.weight", f"{prefix}.mlp.linear_mlp.weight"
    assert block["self_attn.linear_attn.weight"] == Product(attention, "BF16", (64, 64), o, v, 2, 8)
    assert block["mlp.linear_mlp.weight"] == Product(ffn, "BF16", (64, 64), down, up)
    assert set(block) - {"self_attn.linear_attn.weight", "mlp.linear_mlp.weight"} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }


def test_what_is_dropped_is_not_read() -> None:
    gone = BlockConfig(AttentionConfig(no_op=True), FFNConfig(no_op=True))
    plan = plan_child(parent_of(), [gone, BlockConfig(AttentionConfig(no_op=True))])
    assert plan.units[1] == ()
    read = {key for recipe in plan.recipes for key in recipe.sources}
    assert not any(".0." in key or "self_attn" in key or "input_layernorm" in key for key in read)
    everything_gone = plan_child(parent_of(), [gone, gone])
    assert [len(unit) for unit in everything_gone.units] == [1, 0, 0, 2]


def test_what_is_not_said_is_the_parents() -> None:
    parent = parent_of(BLOCKS)
    plan = plan_child(parent, {"6": {"intermediate_size": 16}, 0: {"ffn": {"no_op": True}}})
    assert plan.blocks[1:6] == parent.blocks[1:6]
    assert plan.blocks[0] == BlockConfig(AttentionConfig(2), FFNConfig(no_op=True))
    assert plan.blocks[6] == BlockConfig(AttentionConfig(2), FFNConfig(16))
    assert plan_child(parent, [BlockConfig()] * 7).blocks == parent.blocks


def test_every_unit_is_made_by_one_rank_and_in_order() -> None:
    plan = plan_child(parent_of([(4, 96)] * 5), {3: BlockConfig(ffn=FFNConfig(8))})
    for world_size in range(1, 10):
        shares = [plan.share(rank, world_size) for rank in range(world_size)]
        assert [recipe for share in shares for recipe in share] == plan.recipes
    assert max(sum(recipe.nbytes for recipe in plan.share(rank, 2)) for rank in range(2)) < plan.nbytes * 0.6


def test_plans_are_values() -> None:
    parent = parent_of()
    plans = [
        plan_child(parent, {0: BlockConfig(ffn=FFNConfig(8))}, Rules(ffn_channels=Indexes(range(i, i + 8))))
        for i in (0, 1, 0)
    ]
    assert plans[0] == plans[2] != plans[1]
    assert repr(plans[0]) == repr(plans[2]) != repr(plans[1])


def test_a_cast_leaves_what_is_no_float() -> None:
    parent = parent_of(dtypes={"model.norm.weight": "I64"})
    plan = plan_child(parent, {0: BlockConfig(ffn=FFNConfig(8))}, dtype="F32")
    dtypes = {recipe.key: recipe.dtype for recipe in plan.recipes}
    assert dtypes.pop("model.norm.weight") == "I64"
    assert set(dtypes.values()) == {"F32"}


def test_the_frequencies_of_old_checkpoints_stay_with_their_attention() -> None:
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (4,) for i in range(2)}
    asked = [BlockConfig(AttentionConfig(2)), BlockConfig(AttentionConfig(no_op=True))]
    plan = plan_child(parent_of(extra=extra), asked)
    assert isinstance(block_of(plan, 0)["self_attn.rotary_emb.inv_freq"], Copy)
    assert "self_attn.rotary_emb.inv_freq" not in block_of(plan, 1)


REFUSED: list[tuple[Any, Any, str]] = [
    ({1: FFNConfig(97)}, {}, "block 1: ffn.intermediate_size=97 is more than the parent's 96; a child only"),
    (
        {0: AttentionConfig(8)},
        {},
        "block 0: attention.num_key_value_heads=8 is more than the parent's 4; a child only leaves out: ask "
        "for 4 or less",
    ),
    (
        {0: AttentionConfig(3)},
        {},
        "block 0: attention.num_key_value_heads=3 does not divide num_attention_heads=8",
    ),
    (
        {0: FFNConfig(moe=MoEConfig(num_local_experts=2, num_experts_per_tok=1, expert_intermediate_dim=8))},
        {},
        "block 0: ffn.moe asks for experts, and the parent has none there",
    ),
    ({2: FFNConfig(8)}, {}, "block_configs has the key 2; the blocks are 0-1"),
    (
        {0: FFNConfig(8)},
        {"ffn_channels": {1: "norm"}},
        r"block 0: the FFN narrows from 96 to 8, and ffn_channels does not say how; it has entries for \[1\]",
    ),
    (
        {0: AttentionConfig(2)},
        {"kv_heads": {}},
        "block 0: the attention goes from 4 KV heads to 2, and kv_heads does not say how",
    ),
    (
        {0: FFNConfig(8)},
        {"ffn_channels": Scores([1.0] * 95)},
        "block 0: ffn_channels has 95 scores for the parent's 96; give one for each",
    ),
    (
        {0: FFNConfig(8)},
        {"ffn_channels": Scores([1.0] * 94 + [float("nan"), "x"])},
        "block 0: ffn_channels has scores that are no numbers at 94-95: nan",
    ),
    (
        {0: FFNConfig(2)},
        {"ffn_channels": Indexes([0, 96])},
        "block 0: ffn_channels has 96, which is none of 0-95",
    ),
    ({0: FFNConfig(2)}, {"ffn_channels": Indexes([5, 5])}, "block 0: ffn_channels has an index twice"),
    (
        {0: AttentionConfig(2)},
        {"kv_heads": Indexes([1, 2, 3])},
        "block 0: kv_heads names 3 to keep, but the child has 2",
    ),
    ({0: AttentionConfig(2)}, {"kv_heads": Indexes([0, True])}, "block 0: kv_heads has True, which is none"),
    ({0: AttentionConfig(2)}, {"kv_heads": Scores("abcd")}, "kv_heads: expected a sequence of numbers"),
]


@pytest.mark.parametrize(("parts", "rules", "text"), REFUSED)
def test_the_impossible_is_refused_by_name(parts: Any, rules: Any, text: str) -> None:
    blocks = {
        index: BlockConfig(part) if isinstance(part, AttentionConfig) else BlockConfig(ffn=part)
        for index, part in parts.items()
    }
    with pytest.raises(BlockConfigError, match=text):
        plan_child(parent_of(), blocks, Rules(**rules))


def test_block_configs_of_another_form_are_refused() -> None:
    for blocks, text in (
        (None, "block_configs=None: give one entry for each block, or a mapping with those that change"),
        ("first", "block_configs='first': give one entry for each block"),
        ([BlockConfig()], "too few block configs: 1 for num_hidden_layers=2"),
        ({1: BlockConfig(), "1": {}}, r"block_configs has block 1 twice \(key '1'\)"),
        ([None, BlockConfig()], "block 0: expected a BlockConfig or a mapping, found None"),
    ):
        with pytest.raises(BlockConfigError, match=text):
            plan_child(parent_of(), blocks)  # type: ignore[arg-type]


def test_a_part_is_not_made_of_one_that_is_gone_or_linear() -> None:
    parent = parent_of(BLOCKS)
    for index, block, text in (
        (
            1,
            BlockConfig(AttentionConfig(1)),
            r"asked for, but the parent has no attention there; leave attention",
        ),
        (1, BlockConfig(AttentionConfig(replace_with_linear=True)), "but the parent has no attention there"),
        (2, BlockConfig(ffn=FFNConfig(8)), "but the parent has no FFN there; leave ffn out to keep it so"),
        (3, BlockConfig(AttentionConfig(1)), "but the parent has a linear layer there"),
        (4, BlockConfig(ffn=FFNConfig(8)), "but the parent has a linear layer there"),
    ):
        with pytest.raises(BlockConfigError, match=f"block {index}: .*{text}"):
            plan_child(parent, {index: block})


def test_means_need_groups_of_one_size() -> None:
    parent = parent_of([(6, 96)], num_attention_heads=12, num_key_value_heads=6, hidden_size=96)
    with pytest.raises(
        BlockConfigError,
        match=r"block 0: kv_heads='mean' cannot make 4 KV heads of the parent's 6: groups of",
    ):
        plan_child(parent, {0: BlockConfig(AttentionConfig(4))})


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"ffn_channels": "norms"}, "ffn_channels='norms' is not a rule that is known: 'norm', 'first'"),
        ({"kv_heads": {0: "norm"}}, "kv_heads='norm' is not a rule that is known: 'mean', 'first'"),
        ({"linear": "zero"}, "linear='zero' is not a rule that is known: 'product'"),
        ({"kv_heads": [[0, 1], "mean"]}, r"kv_heads has an entry \[0, 1\]: an entry is the name of a rule"),
        ({"ffn_channels": ["norm"]}, "ffn_channels has 1 entries for 2 blocks; give one for each block"),
        ({"ffn_channels": {2: "norm"}}, r"ffn_channels has entries for \[2\]; the blocks are 0-1"),
        ({"ffn_channels": 7}, r"ffn_channels=7: an entry is the name of a rule, Scores\(…\) or Indexes\(…\)"),
    ],
)
def test_a_mistyped_rule_is_an_error_even_where_no_block_needs_it(rules: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        plan_child(parent_of(), [BlockConfig()] * 2, Rules(**rules))


def test_a_tensor_of_which_nobody_knows_how_it_changes_is_not_guessed_at() -> None:
    for extra, block, text in (
        (
            "mlp.scales",
            BlockConfig(ffn=FFNConfig(8)),
            "ffn.intermediate_size cannot be changed: it is not known",
        ),
        (
            "self_attn.sinks",
            BlockConfig(AttentionConfig(2)),
            "the number of heads cannot be changed",
        ),
    ):
        parent = parent_of(extra={f"model.layers.0.{extra}": (8,)})
        with pytest.raises(BlockConfigError, match=rf"block 0: {text}.*{extra} \(8,\)"):
            plan_child(parent, {0: block})
        assert extra in block_of(plan_child(parent, [BlockConfig()] * 2), 0)


def test_quantised_weights_are_moved_but_not_computed_with() -> None:
    prefix = "model.layers.0"
    keys = [f"{prefix}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    keys += [f"{prefix}.self_attn.{name}_proj.weight" for name in "qkvo"]
    parent = parent_of(dtypes=dict.fromkeys(keys, "F8_E4M3"))
    for block in (
        BlockConfig(ffn=FFNConfig(8)),
        BlockConfig(AttentionConfig(2)),
        BlockConfig(AttentionConfig(replace_with_linear=True)),
    ):
        with pytest.raises(
            BlockConfigError, match=r"block 0: model.layers.0.* would be computed with, but is F8"
        ):
            plan_child(parent, {0: block})
    first = Rules("first", "first")
    plan = plan_child(parent, {0: BlockConfig(AttentionConfig(2), FFNConfig(8))}, first)
    assert {block_of(plan, 0)[f"mlp.{name}_proj.weight"].dtype for name in ("gate", "down")} == {"F8_E4M3"}


def test_a_parent_is_checked_before_anything_is_planned() -> None:
    base = tiny_config(layers=1, **SIZES)
    tensors = entries(block_shapes(base, [(4, 96)]))
    llama = ModelDescriptor.from_family("llama")
    with pytest.raises(FamilyError, match="family 'gpt2', of which no children can be made so far"):
        Parent.of("there", tensors, base.to_dict(), ModelDescriptor.from_family("gpt2"))
    foreign = {f"net.{key}": entry for key, entry in tensors.items()}
    with pytest.raises(
        CheckpointError, match=r"no tensor is under model\.layers, where llama keeps its blocks"
    ):
        Parent.of("there", foreign, base.to_dict(), llama)
    said = base.to_dict() | {"block_configs": [{"ffn": {"no_op": True}}]}
    with pytest.raises(
        CheckpointError, match=r"there: the config says that block 0 is .*no_op=True.*tensors say"
    ):
        Parent.of("there", tensors, said, llama)


@pytest.mark.parametrize("module", MODULES)
def test_every_docstring_example_runs(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"sharded_ckpt.children.{module}"))
    assert results.attempted > 0
    assert results.failed == 0


def test_planning_imports_no_torch() -> None:
    import subprocess
    import sys

    check = "import sys; from sharded_ckpt.children import init_child_from_parent, plan\n"
    check += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
