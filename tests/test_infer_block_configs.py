"""Block configs are read off tensor names and shapes; contradictions are refused with names and shapes."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig, MoEConfig
from patchers.dialects import read_block_configs
from patchers.errors import BlockConfigError
from patchers.inference import infer_block_configs

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
NAMES = ["anymodel_llama", "anymodel_qwen3_tied", "nemotron_nas", "nemotron_nas_tied_noop_first"]
BASE = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
HIDDEN, HEAD_DIM = 64, 16


def attention(kv_heads, module="self_attn", names=("q_proj", "k_proj", "v_proj", "o_proj")):
    rows = (HIDDEN, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM)
    shapes = [*((size, HIDDEN) for size in rows), (HIDDEN, HIDDEN)]
    return {f"{module}.{name}.weight": shape for name, shape in zip(names, shapes, strict=True)}


def ffn(width, module="mlp", names=("gate_proj", "up_proj", "down_proj")):
    shapes = [(width, HIDDEN)] * (len(names) - 1) + [(HIDDEN, width)]
    return {f"{module}.{name}.weight": shape for name, shape in zip(names, shapes, strict=True)}


def norms():
    return {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}


def experts(count, width, module="mlp.experts", names=("gate_proj", "up_proj", "down_proj")):
    shapes = [ffn(width, f"{module}.{index}", names) for index in range(count)]
    return {name: shape for expert in shapes for name, shape in expert.items()}


def stacked(count, width, transposed):
    fused, down = (2 * width, HIDDEN), (HIDDEN, width)
    sides = (fused[::-1], down[::-1]) if transposed else (fused, down)
    names = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    return {name: (count, *side) for name, side in zip(names, sides, strict=True)}


def infer(*blocks, prefix="model.layers", **base):
    outside = {"model.embed_tokens.weight": (99, HIDDEN), "lm_head.weight": (99, HIDDEN)}
    inside = {
        f"{prefix}.{i}.{name}": shape for i, block in enumerate(blocks) for name, shape in block.items()
    }
    return infer_block_configs(outside | inside, {**BASE, "num_hidden_layers": len(blocks), **base})


def refused(*blocks, **base):
    with pytest.raises(BlockConfigError) as caught:
        infer(*blocks, **base)
    return str(caught.value)


def header_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        header.pop("__metadata__", None)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    return shapes


# --- what is read


@pytest.mark.parametrize("name", NAMES)
def test_a_real_checkpoint_says_what_its_config_says(name):
    folder = GOLDEN / name / "checkpoint"
    if not folder.exists():
        pytest.skip(f"{name} lies in a folder shared/ beside the checkout, which is not there")
    config = json.loads((folder / "config.json").read_text())
    assert infer_block_configs(header_shapes(folder), config) == read_block_configs(config)[0]


def test_sizes_of_every_block_come_out_said():
    first, second = infer(norms() | attention(2) | ffn(96), norms() | attention(4) | ffn(32))
    assert first == BlockConfig(AttentionConfig(2), FFNConfig(96))
    assert second == BlockConfig(AttentionConfig(4), FFNConfig(32))


def test_missing_parts_are_no_ops_and_so_is_a_missing_block():
    blocks = infer(norms() | attention(2), {"post_attention_layernorm.weight": (HIDDEN,)} | ffn(96), {})
    assert blocks == [
        BlockConfig(AttentionConfig(2), FFNConfig(no_op=True)),
        BlockConfig(AttentionConfig(no_op=True), FFNConfig(96)),
        BlockConfig(AttentionConfig(no_op=True), FFNConfig(no_op=True)),
    ]


def test_a_model_without_any_tensor_is_no_ops_throughout():
    gone = BlockConfig(AttentionConfig(no_op=True), FFNConfig(no_op=True))
    assert infer_block_configs({}, {**BASE, "num_hidden_layers": 2}) == [gone, gone]


def test_linear_replacements_are_told_by_their_names():
    linear = {"self_attn.linear_attn.weight": (HIDDEN, HIDDEN), "mlp.linear_mlp.weight": (HIDDEN, HIDDEN)}
    linear_parts = AttentionConfig(replace_with_linear=True), FFNConfig(replace_with_linear=True)
    assert infer(norms() | linear) == [BlockConfig(*linear_parts)]


def test_shapes_may_come_as_anything_that_has_a_shape():
    named = {f"model.layers.0.{name}": SimpleNamespace(shape=list(shape)) for name, shape in ffn(96).items()}
    assert infer_block_configs(named, BASE)[0].ffn == FFNConfig(96)


def test_an_explicit_head_dim_counts():
    wide = {name: shape for name, shape in attention(2).items()}
    wide["self_attn.q_proj.weight"], wide["self_attn.o_proj.weight"] = (128, HIDDEN), (HIDDEN, 128)
    assert infer(wide, head_dim=32)[0].attention == AttentionConfig(1)


@pytest.mark.parametrize(
    ("prefix", "block", "expected"),
    [
        (
            "model.layers",  # phi3
            {
                "self_attn.qkv_proj.weight": (HIDDEN + 2 * 2 * HEAD_DIM, HIDDEN),
                "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
                "mlp.gate_up_proj.weight": (2 * 96, HIDDEN),
                "mlp.down_proj.weight": (HIDDEN, 96),
            },
            BlockConfig(AttentionConfig(2), FFNConfig(96)),
        ),
        (
            "h",  # gpt2: Conv1D keeps (in, out)
            {
                "attn.c_attn.weight": (HIDDEN, 3 * HIDDEN),
                "attn.c_proj.weight": (HIDDEN, HIDDEN),
                "mlp.c_fc.weight": (HIDDEN, 96),
                "mlp.c_proj.weight": (96, HIDDEN),
            },
            BlockConfig(AttentionConfig(4), FFNConfig(96)),
        ),
        (
            "transformer.h",  # bloom, falcon
            {
                "self_attention.query_key_value.weight": (3 * HIDDEN, HIDDEN),
                "self_attention.dense.weight": (HIDDEN, HIDDEN),
                "mlp.dense_h_to_4h.weight": (96, HIDDEN),
                "mlp.dense_4h_to_h.weight": (HIDDEN, 96),
            },
            BlockConfig(AttentionConfig(4), FFNConfig(96)),
        ),
        (
            "model.decoder.layers",  # opt: the FFN has no module of its own
            attention(4, names=("q_proj", "k_proj", "v_proj", "out_proj")) | ffn(96, "x", ("fc1", "fc2")),
            BlockConfig(AttentionConfig(4), FFNConfig(96)),
        ),
        (
            "layers",  # llama as Meta publishes it
            attention(2, "attention", ("wq", "wk", "wv", "wo")) | ffn(96, "feed_forward", ("w1", "w3", "w2")),
            BlockConfig(AttentionConfig(2), FFNConfig(96)),
        ),
        (
            "model.layers",  # no gate (nemotron)
            attention(2) | ffn(96, names=("up_proj", "down_proj")),
            BlockConfig(AttentionConfig(2), FFNConfig(96)),
        ),
    ],
)
def test_other_families_names_are_known(prefix, block, expected):
    block = {name.removeprefix("x."): shape for name, shape in block.items()}
    assert infer(block, prefix=prefix) == [expected]


# --- experts


@pytest.mark.parametrize(
    "weights",
    [
        experts(4, 48),
        experts(4, 48, "block_sparse_moe.experts", ("w1", "w3", "w2")),
        stacked(4, 48, transposed=False),
        stacked(4, 48, transposed=True),
        stacked(4, 48, transposed=False) | {"mlp.gate.weight": (4, HIDDEN)},
    ],
    ids=["listed", "mixtral", "stacked", "transposed", "with router"],
)
def test_experts_are_counted_and_measured(weights):
    [block] = infer(attention(2) | weights)
    assert block.ffn == FFNConfig(moe=MoEConfig(4, None, 48, 0))


def test_a_square_stack_of_experts_is_still_measured():
    assert (
        infer(attention(2) | stacked(4, HIDDEN // 2, transposed=True))[0].ffn.moe.expert_intermediate_dim
        == 32
    )
    assert (
        infer(attention(2) | stacked(4, HIDDEN, transposed=False))[0].ffn.moe.expert_intermediate_dim
        == HIDDEN
    )


@pytest.mark.parametrize("module", ["mlp.shared_expert", "mlp.shared_experts", "mlp.shared_mlp"])
def test_shared_experts_and_visited_experts_are_told(module):
    block = attention(2) | experts(4, 48) | ffn(80, module) | {"mlp.shared_expert_gate.weight": (1, HIDDEN)}
    [inferred] = infer(block, num_experts=8, num_experts_per_tok=2)
    assert inferred.ffn.moe == MoEConfig(4, 2, 48, 80)


def test_dense_and_sparse_blocks_may_alternate():
    dense, sparse = infer(attention(2) | ffn(96), attention(2) | experts(4, 48))
    assert (dense.ffn, sparse.ffn.moe.num_local_experts) == (FFNConfig(96), 4)


# --- what is refused

KV = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp.up_proj.weight": (80, 64)},
         f"FFN widths contradict each other: {MLP}.gate_proj.weight (96, 64) says 96, "
         f"{MLP}.up_proj.weight (80, 64) says 80, {MLP}.down_proj.weight (64, 96) says 96"),
        ({"mlp.down_proj.weight": (64, 80)}, f"{MLP}.down_proj.weight (64, 80) says 80"),
        ({"mlp.down_proj.weight": (96, 64)},
         f"{MLP}.down_proj.weight (96, 64): expected (64, …) at hidden_size=64"),
        ({"mlp.up_proj.weight": None}, "FFN without up: there is only"),
        ({"mlp.up_proj.weight": (96,)}, "expected (…, 64) at hidden_size=64"),
        ({"self_attn.v_proj.weight": (16, 64)},
         f"KV rows contradict each other: {KV}.k_proj.weight (32, 64) says 32, "
         f"{KV}.v_proj.weight (16, 64) says 16"),
        ({"self_attn.k_proj.weight": (24, 64), "self_attn.v_proj.weight": (24, 64)},
         f"{KV}.k_proj.weight (24, 64), {KV}.v_proj.weight (24, 64): no number of KV heads of head_dim=16"),
        ({"self_attn.k_proj.weight": (48, 64), "self_attn.v_proj.weight": (48, 64)},
         "divides num_attention_heads=4"),
        ({"self_attn.k_proj.weight": (32, 32)}, f"{KV}.k_proj.weight (32, 32): expected (…, 64)"),
        ({"self_attn.o_proj.weight": (64, 48)}, f"{KV}.o_proj.weight (64, 48): no number of query heads of "),
        ({"self_attn.q_proj.weight": (48, 64)}, f"{KV}.q_proj.weight (48, 64), {KV}.o_proj.weight (64, 64)"),
        ({"self_attn.v_proj.weight": None}, "attention without v: there is only"),
        ({"self_attn.linear_attn.weight": (64, 64)}, "a linear replacement beside the part that it replaces"),
        ({"mlp.linear_mlp.weight": (64, 64)}, "a linear replacement beside the part that it replaces"),
        ({"mlp.experts.0.up_proj.weight": (8, 64)}, "beside experts: a dense FFN and experts in one block"),
        ({"attn.k_proj.weight": (32, 64)}, "two tensors for one place"),
    ],
)  # fmt: skip
def test_contradictory_shapes_are_refused_naming_keys_and_shapes(change, message):
    block = {**attention(2), **ffn(96), **change}
    text = refused({name: shape for name, shape in block.items() if shape is not None})
    assert text.startswith("block 0: ")
    assert message in text


def without(block, pattern):
    return {name: shape for name, shape in block.items() if not re.search(pattern, name)}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (without(experts(4, 48), r"experts\.2\."),
         "experts 2 are missing beside model.layers.0.mlp.experts.0.gate_proj"),
        (without(experts(4, 48), r"3\.up_proj"), "expert 3 without up"),
        (experts(4, 48) | ffn(32, "mlp.experts.1"), "expert widths contradict each other"),
        (experts(4, 48) | {"mlp.gate.weight": (8, 64)},
         "mlp.gate.weight (8, 64) routes to 8 experts, but there are 4"),
        ({"mlp.gate.weight": (8, 64)}, "belong to experts, but there are no experts"),
        (stacked(4, 48, False) | {"mlp.experts.down_proj": (3, 64, 48)}, "experts contradict each other"),
        ({"mlp.experts.gate_up_proj": (96, 64)}, "stacked experts have three dimensions"),
        ({"mlp.gate_up_proj.weight": (95, 64), "mlp.down_proj.weight": (64, 48)},
         "holds gate and up, but 95 rows"),
        (experts(1, 48), "moe.num_experts_per_tok=2 is more than moe.num_local_experts=1"),
    ],
)  # fmt: skip
def test_contradictory_experts_are_refused(weights, message):
    assert message in refused(attention(2) | weights, num_local_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (ffn(96) | {"mamba.in_proj.weight": (128, 64)},
         "no attention of a known kind, but tensors that may be one: "
         "model.layers.0.mamba.in_proj.weight (128, 64)"),
        (ffn(96) | {"self_attn.kv_b_proj.weight": (128, 16), "self_attn.o_proj.weight": (64, 64)},
         "self_attn.kv_b_proj"),
        (ffn(96) | {"self_attn.k_proj.qweight": (8, 32)},
         "self_attn.k_proj.qweight (8, 32); if they are another kind of"),
        (attention(2) | {"mlp.experts.gate_up_proj_blocks": (4, 96, 2, 16)}, "no FFN of a known kind"),
    ],
    ids=["mamba", "latent attention", "gptq", "mxfp4"],
)  # fmt: skip
def test_an_unknown_kind_of_part_is_never_taken_for_a_missing_one(block, message):
    assert message in refused(norms() | block)


def test_a_gate_that_some_blocks_lack_is_refused():
    text = refused(attention(2) | ffn(96), attention(2) | ffn(96, names=("up_proj", "down_proj")))
    assert text == "blocks 0 have a gate in their FFN, blocks 1 have none: gate_proj is missing there"


def test_tensors_beyond_the_last_block_are_refused():
    tensors = {f"model.layers.{index}.mlp.up_proj.weight": (96, 64) for index in (0, 7, 8)}
    with pytest.raises(BlockConfigError) as caught:
        infer_block_configs(tensors, BASE)
    assert str(caught.value).startswith(
        "model.layers.{7-8}.mlp.up_proj.weight: beyond the last block, since num_hidden"
    )


def test_names_without_blocks_are_refused_and_shown():
    with pytest.raises(
        BlockConfigError, match=r"no tensor belongs to a block .* the names are lm_head\.weight"
    ):
        infer_block_configs({"lm_head.weight": (99, 64)}, BASE)


def test_blocks_in_two_places_are_refused_until_one_is_named():
    text = {f"language_model.layers.0.{name}": shape for name, shape in (attention(2) | ffn(96)).items()}
    vision = {f"vision.blocks.{index}.mlp.fc1.weight": (96, 64) for index in range(3)}
    with pytest.raises(
        BlockConfigError, match=r"2 places: language_model\.layers, vision\.blocks; say which with layers="
    ):
        infer_block_configs(text | vision, BASE)
    named = infer_block_configs(text | vision, BASE, layers="language_model.layers")
    assert named == [BlockConfig(AttentionConfig(2), FFNConfig(96))]
    with pytest.raises(
        BlockConfigError, match=r"no tensor is under model\.layers; blocks are under language_model"
    ):
        infer_block_configs(text | vision, BASE, layers="model.layers")


def test_a_config_that_lacks_the_sizes_to_measure_with_is_refused():
    assert "does not say num_attention_heads" in refused(attention(2), num_attention_heads=None)
    assert "does not say head_dim, which is needed" in refused(attention(2), num_attention_heads=6)


# --- native models


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("gemma2", {}),
        ("phi3", {}),
        ("starcoder2", {}),
        ("mixtral", {"num_local_experts": 4}),
        ("granitemoe", {"num_local_experts": 4}),
        ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 16}),
    ],
)
def test_a_native_model_is_inferred_as_its_config_says(family, sizes):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config = AutoConfig.for_model(
        family, vocab_size=32, num_hidden_layers=2, pad_token_id=0, **common, **sizes
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    raw = config.to_dict()
    expected = FFNConfig(96)
    if "num_experts_per_tok" in raw:
        width = raw.get("moe_intermediate_size", 96)
        shared = raw.get("shared_expert_intermediate_size", 0)
        expected = FFNConfig(moe=MoEConfig(4, raw["num_experts_per_tok"], width, shared))
    assert infer_block_configs(model.state_dict(), raw) == [BlockConfig(AttentionConfig(2), expected)] * 2
