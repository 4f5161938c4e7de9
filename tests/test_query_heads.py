"""Blocks may have other query heads than the config says: built, computed with, saved, inferred, pruned."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import drawn_model, family_config
from support.tiny import tensors_of, tiny_checkpoint, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedConfig

from patchers import (
    AttentionConfig,
    BlockConfig,
    ModelDescriptor,
    deci_x_patcher,
    infer_block_configs,
    parse_blocks,
    read_block_configs,
    write_block_configs,
)
from patchers.deci_x import as_described
from patchers.errors import BlockConfigError, FamilyError
from sharded_ckpt import load_and_shard_model, save_sharded_checkpoint
from sharded_ckpt.children import Indexes, Scores, init_child_from_parent
from sharded_ckpt.ownership import costs_of, skeleton_costs

IDS = torch.tensor([[5, 60, 7, 81, 9, 100, 11, 12]])
BASE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}
SIX = BlockConfig(AttentionConfig(2, num_attention_heads=6))
THREE = BlockConfig(AttentionConfig(1, num_attention_heads=3))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


# --- saying it


def test_notations_that_have_a_word_for_query_heads_say_them() -> None:
    written = write_block_configs([THREE, BlockConfig(AttentionConfig(2))], "anymodel", BASE)
    three, plain = (block["attention"] for block in written["block_configs"])
    assert (three["num_attention_heads"], three["num_key_value_heads"]) == (3, 1)
    assert "num_attention_heads" not in plain  # which NVIDIA's package does not know
    sparse = write_block_configs([THREE, BlockConfig()], "per-layer", BASE)
    assert sparse == {"per_layer_config": {"0": {"num_attention_heads": 3, "num_key_value_heads": 1}}}
    for fields in (written, sparse):
        read = read_block_configs({**BASE, **json.loads(json.dumps(fields))})
        assert read is not None
        assert read[0][0].attention == THREE.attention


@pytest.mark.parametrize("dialect", ["nemotron-nas", "transitional", "megatron"])
def test_notations_that_have_no_word_for_query_heads_refuse_them(dialect: str) -> None:
    blocks = [THREE, BlockConfig()]
    text = (
        f"block 0: attention.num_attention_heads=3 cannot be said in {dialect}; write anymodel or per-layer"
    )
    with pytest.raises(BlockConfigError, match=re.escape(text)):
        write_block_configs(blocks, dialect, {**BASE, "intermediate_size": 256})
    as_in_all = BlockConfig(AttentionConfig(2, num_attention_heads=4))
    assert write_block_configs([as_in_all] * 2, dialect, {**BASE, "intermediate_size": 256})


@pytest.mark.parametrize(
    ("attention", "text"),
    [
        ({"num_attention_heads": 3}, "num_key_value_heads=2 does not divide attention.num_attention_heads=3 "
         "(num_key_value_heads of the base config): say num_key_value_heads of this block"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads=4 does not divide "
         "attention.num_attention_heads=6"),
        ({"num_attention_heads": 0}, "attention.num_attention_heads=0 is not a positive whole number"),
        ({"num_attention_heads": 4, "n_heads_in_group": 2}, "'num_attention_heads' of attention is not a "
         "field of the nemotron-nas dialect"),
    ],
)  # fmt: skip
def test_query_heads_that_cannot_be_are_refused(attention: dict[str, int], text: str) -> None:
    with pytest.raises(BlockConfigError, match=re.escape(text)):
        parse_blocks([{"attention": attention}, {}], BASE)


# --- building it


def built(config: PreTrainedConfig, blocks: list[Any]) -> Any:
    with as_described(ModelDescriptor.from_config(config), config, blocks):
        return drawn_model(config)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt_oss", "qwen3_next", "olmo2"])
def test_a_model_with_other_query_heads_is_saved_and_read_back(family: str, tmp_path: Path) -> None:
    config = family_config(family)
    blocks = [BlockConfig(), SIX, BlockConfig(), THREE]
    model = built(config, blocks)
    attention = model.model.layers[3].self_attn
    assert attention.o_proj.weight.shape == (64, 48)
    model.config.block_configs = blocks
    save_sharded_checkpoint(model, tmp_path / "saved", durable=False)
    again = load_and_shard_model("auto", tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    shard = load_and_shard_model("auto", tmp_path / "saved", {3})
    assert torch.equal(shard.model.layers[3].self_attn.o_proj.weight, attention.o_proj.weight)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom", "falcon", "opt", "mamba", "dbrx"])
def test_families_whose_heads_would_shrink_as_they_grow_more_refuse_by_name(family: str) -> None:
    config = family_config(family)
    blocks = [{}, {"attention": {"num_attention_heads": 8}}, {}, {}]
    text = "block 1 asks for num_attention_heads=8, but in .* no config field moves the query heads"
    with deci_x_patcher(config, blocks), pytest.raises(FamilyError, match=text):
        drawn_model(config)


def test_heads_that_follow_each_other_are_said_together() -> None:
    config = family_config("deepseek_v3")
    blocks = [BlockConfig(AttentionConfig(6, num_attention_heads=6))] * 4
    model = built(config, blocks)
    assert model.model.layers[0].self_attn.num_key_value_groups == 1
    with pytest.raises(FamilyError, match="num_key_value_heads=3, but in deepseek_v3 no config field moves"):
        built(config, [BlockConfig(AttentionConfig(3, num_attention_heads=6))] * 4)


def test_costs_count_the_query_heads_of_each_block() -> None:
    config = tiny_config("llama", layers=2, dtype="bfloat16", attention_bias=True)
    config.block_configs = write_block_configs([SIX, THREE], "anymodel", config.to_dict())["block_configs"]
    for by in ("bytes", "parameters", "bytes+kv"):
        assert costs_of(config, by=by, length=8).blocks == skeleton_costs(config, by=by, length=8).blocks
    six, three = costs_of(config, by="flops", length=8).blocks
    assert six > three


# --- telling it from tensors


def shapes(heads: int, kv_heads: int, index: int) -> dict[str, tuple[int, int]]:
    rows = {"q": heads * 16, "k": kv_heads * 16, "v": kv_heads * 16}
    prefix = f"model.layers.{index}.self_attn"
    found = {f"{prefix}.{name}_proj.weight": (size, 64) for name, size in rows.items()}
    return {**found, f"{prefix}.o_proj.weight": (64, heads * 16)}


def test_query_heads_are_counted_where_the_size_of_a_head_is_certain() -> None:
    tensors = shapes(4, 2, 0) | shapes(6, 3, 1)
    first, second = (block.attention for block in infer_block_configs(tensors, BASE))
    assert first == AttentionConfig(2)
    assert second == AttentionConfig(3, num_attention_heads=6)


def test_query_heads_are_not_counted_by_a_size_that_nothing_confirms() -> None:
    tensors = shapes(6, 3, 0) | shapes(6, 3, 1)
    with pytest.raises(
        BlockConfigError, match="no attention fits 4 heads of 16; the config says no head_dim"
    ):
        infer_block_configs(tensors, BASE)
    for confirmed in ({"head_dim": 16}, {"model_type": "qwen2"}):
        blocks = infer_block_configs(tensors, {**BASE, **confirmed})
        assert blocks[0].attention == AttentionConfig(3, num_attention_heads=6)


# --- leaving heads out

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


def without_heads(parent: Path, layer: int, gone: list[int]) -> Any:
    """The parent, of which some query heads add nothing."""
    model = AutoModelForCausalLM.from_pretrained(parent)
    weight = model.model.layers[layer].self_attn.o_proj.weight
    with torch.no_grad():
        for head in gone:
            weight[:, 8 * head : 8 * head + 8] = 0
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("asked", "rules", "gone"),
    [
        (AttentionConfig(num_attention_heads=4), {"query_heads": "first"}, [1, 3, 5, 7]),
        (AttentionConfig(num_attention_heads=4),
         {"query_heads": Scores([1, 2, 4, 3, 0, 1, 1, 1])}, [0, 3, 4, 7]),
        (AttentionConfig(num_attention_heads=4), {"query_heads": {1: Indexes([1, 2, 5, 6])}}, [0, 3, 4, 7]),
        (AttentionConfig(2, num_attention_heads=4), {"kv_heads": Indexes([1, 3])}, [0, 1, 4, 5]),
        (AttentionConfig(3, num_attention_heads=6), {"kv_heads": "first"}, [6, 7]),
        (AttentionConfig(1, num_attention_heads=4), {"kv_heads": Indexes([2])}, [0, 1, 2, 3, 6, 7]),
        (AttentionConfig(2, num_attention_heads=2),
         {"kv_heads": Indexes([1, 2]), "query_heads": Scores([9, 9, 1, 2, 2, 1, 9, 9])}, [0, 1, 2, 5, 6, 7]),
    ],
)  # fmt: skip
def test_a_child_computes_what_its_parent_does_without_the_heads_that_go(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    asked: AttentionConfig,
    rules: dict[str, Any],
    gone: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("child")
    bias = {"attention_bias": True} if family == "llama" else {}
    parent = tiny_checkpoint(folder, family, layers=2, **SIZES, **bias)
    init_child_from_parent(parent, {1: BlockConfig(asked)}, folder / "child", durable=False, **rules)
    child = load_and_shard_model("auto", folder / "child")
    attention = child.model.layers[1].self_attn
    assert attention.q_proj.weight.shape == (8 * (asked.num_attention_heads or 8), 64)
    expected = logits(without_heads(parent, 1, gone))
    torch.testing.assert_close(logits(child), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(parent)))
    cached = child.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    plain = child.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(cached, plain)


def test_queries_on_a_mean_of_kv_heads_can_be_fewer_too(tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path, "llama", layers=1, **SIZES)
    asked = {0: BlockConfig(AttentionConfig(2, num_attention_heads=4))}
    init_child_from_parent(parent, asked, tmp_path / "c", query_heads=Indexes([0, 3, 4, 5]), durable=False)
    had, found = tensors_of(parent), tensors_of(tmp_path / "c")
    prefix = "model.layers.0.self_attn"
    heads = had[f"{prefix}.q_proj.weight"].view(8, 8, 64)[[0, 3, 4, 5]]
    assert torch.equal(found[f"{prefix}.q_proj.weight"], heads.flatten(0, 1))
    keys = had[f"{prefix}.k_proj.weight"].view(2, 2, 8, 64).mean(1)
    assert torch.equal(found[f"{prefix}.k_proj.weight"], keys.flatten(0, 1))
    grandchild = {0: BlockConfig(AttentionConfig(1))}  # what is not said stays the parent's: 4 query heads
    report = init_child_from_parent(tmp_path / "c", grandchild, tmp_path / "g", durable=False)
    assert report.blocks[0].attention == AttentionConfig(1, num_attention_heads=4)
    linear = {0: BlockConfig(AttentionConfig(replace_with_linear=True))}
    init_child_from_parent(tmp_path / "c", linear, tmp_path / "l", durable=False)
    weight = tensors_of(tmp_path / "l")[f"{prefix}.linear_attn.weight"]
    values = found[f"{prefix}.v_proj.weight"].view(2, 8, 64).repeat_interleave(2, 0).flatten(0, 1)
    torch.testing.assert_close(weight, found[f"{prefix}.o_proj.weight"] @ values)


@pytest.mark.parametrize(
    ("asked", "rules", "text"),
    [
        (AttentionConfig(num_attention_heads=4), {}, "block 0: the attention goes from 2 query heads on each "
         "KV head to 1: say which stay by query_heads='first', Scores or Indexes"),
        (AttentionConfig(num_attention_heads=4), {"query_heads": Indexes([0, 1, 2, 4])},
         "block 0: query_heads names 2, 1, 1, 0 of the query heads on each KV head of the child; name 1 of "
         "each of 0-1, 2-3, 4-5, 6-7"),
        (AttentionConfig(num_attention_heads=4), {"query_heads": Scores([1.0] * 4)},
         "block 0: query_heads has 4 scores for the parent's 8; give one for each"),
        (AttentionConfig(num_attention_heads=16), {},
         "block 0: attention.num_attention_heads=16 is more than the parent's 8; a child only leaves out"),
    ],
)  # fmt: skip
def test_query_heads_that_no_child_can_have_are_refused(
    tmp_path: Path, asked: AttentionConfig, rules: dict[str, Any], text: str
) -> None:
    parent = tiny_checkpoint(tmp_path, "llama", layers=1, **SIZES)
    with pytest.raises(BlockConfigError, match=re.escape(text)):
        init_child_from_parent(parent, {0: BlockConfig(asked)}, tmp_path / "c", **rules)
    assert not (tmp_path / "c").exists()
