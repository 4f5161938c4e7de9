"""Every dialect is read and written without loss where it can say it, and refuses where it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchers.base_sizes import BaseSizes, resolve_block
from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig, MambaConfig, MoEConfig
from patchers.dialects import (
    CONFIG_FIELDS,
    Dialect,
    detect_dialect,
    parse_blocks,
    read_block_configs,
    write_block_configs,
)
from patchers.dialects.nemotron import ffn_mult_of, width_of
from patchers.errors import BlockConfigError

SHARED = Path(__file__).resolve().parents[2] / "shared"
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1024,
    "hidden_act": "silu",
}
QWEN3_MOE = {**LLAMA, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
LISTING = [dialect for dialect in Dialect if dialect is not Dialect.PER_LAYER]


REAL_CONFIGS = [
    "configs/llama-3_1-nemotron-ultra-253b-v1.config.json",
    "configs/llama-3_3-nemotron-super-49b-v1.config.json",
    "golden/anymodel_llama/checkpoint/config.json",
    "golden/anymodel_qwen3_tied/checkpoint/config.json",
    "golden/nemotron_nas/checkpoint/config.json",
    "golden/nemotron_nas_tied_noop_first/checkpoint/config.json",
]


def real_config(name: str) -> dict:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} lies in a folder shared/ beside the checkout, which is not there")
    return json.loads((SHARED / name).read_text())


def resolved(blocks: list[BlockConfig], base: dict) -> list[BlockConfig]:
    return [resolve_block(block, BaseSizes.of(base)) for block in blocks]


def through(blocks: list[BlockConfig], dialect: Dialect, base: dict) -> list[BlockConfig]:
    """Write blocks as a dialect into a config that went through JSON, and read them back."""
    written = json.loads(json.dumps({**base, **write_block_configs(blocks, dialect, base)}))
    found = read_block_configs(written)
    assert found is not None
    assert found[1] is dialect
    return found[0]


# --- real files


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_a_real_config_is_read_and_written_to_identical_text(name):
    config = real_config(name)
    blocks, dialect = read_block_configs(config)
    assert len(blocks) == config["num_hidden_layers"]
    written = write_block_configs(blocks, dialect, config)
    assert json.dumps(written, indent=2) == json.dumps({"block_configs": config["block_configs"]}, indent=2)


def test_published_widths_and_heads_are_those_of_the_paper():
    blocks, dialect = read_block_configs(real_config(REAL_CONFIGS[1]))
    assert dialect is Dialect.NEMOTRON_NAS
    assert blocks[0] == BlockConfig(AttentionConfig(8), FFNConfig(14336))
    assert blocks[6] == BlockConfig(AttentionConfig(no_op=True), FFNConfig(14336))
    assert {block.ffn.intermediate_size for block in blocks} == {2816, 5632, 7168, 14336, 17920, 28672}


# --- exact layouts


def test_anymodel_is_laid_out_as_nvidias_package_writes_it():
    blocks = [BlockConfig(), BlockConfig(AttentionConfig(no_op=True), FFNConfig(moe=MoEConfig(8, 2, 256)))]
    written = write_block_configs(blocks, "anymodel", {**LLAMA, "num_hidden_layers": 2})
    assert json.dumps(written["block_configs"]) == (
        '[{"attention": {"llama4": null, "mamba": null, "no_op": false, "num_key_value_heads": 4, '
        '"replace_with_linear": false, "sparsify": null, "weights_precision": "bf16"}, '
        '"ffn": {"intermediate_size": 1024, "moe": null, "no_op": false, "replace_with_linear": false, '
        '"sparsify": null, "weights_precision": "bf16"}, "parallel_blocks": null}, '
        '{"attention": {"llama4": null, "mamba": null, "no_op": true, "num_key_value_heads": null, '
        '"replace_with_linear": false, "sparsify": null, "weights_precision": "bf16"}, '
        '"ffn": {"intermediate_size": null, "moe": {"num_local_experts": 8, "num_experts_per_tok": 2, '
        '"expert_intermediate_dim": 256, "shared_expert_intermediate_dim": 0}, "no_op": false, '
        '"replace_with_linear": false, "sparsify": null, "weights_precision": "bf16"}, '
        '"parallel_blocks": null}]'
    )


def test_megatron_is_laid_out_as_megatron_core_reads_it():
    base = {**LLAMA, "num_hidden_layers": 2}
    blocks = [BlockConfig(AttentionConfig(2)), BlockConfig(ffn=FFNConfig(replace_with_linear=True))]
    written = write_block_configs(blocks, Dialect.MEGATRON, base)
    assert written == {
        "heterogeneous_layers_config_encoded_json": json.dumps(
            {
                "block_configs": [
                    {
                        "attention": {"no_op": False, "replace_with_linear": False, "num_query_groups": 2},
                        "mlp": {"no_op": False, "replace_with_linear": False, "ffn_hidden_size": None},
                    },
                    {
                        "attention": {"no_op": False, "replace_with_linear": False, "num_query_groups": None},
                        "mlp": {"no_op": False, "replace_with_linear": True, "ffn_hidden_size": None},
                    },
                ]
            }
        )
    }


def test_transitional_nulls_what_the_origin_nulls_in_a_removed_part():
    base = {**LLAMA, "num_hidden_layers": 2}
    blocks = [BlockConfig(), BlockConfig(AttentionConfig(no_op=True), FFNConfig(replace_with_linear=True))]
    kept, gone = write_block_configs(blocks, "transitional", base)["block_configs"]
    assert (kept["ffn"]["gated"], kept["ffn"]["hidden_act"], kept["ffn"]["intermediate_size"]) == (
        True,
        "silu",
        1024,
    )
    assert (kept["attention"]["n_heads_in_group"], kept["attention"]["unshifted_sink"]) == (2, False)
    assert (gone["ffn"]["gated"], gone["ffn"]["hidden_act"], gone["ffn"]["intermediate_size"]) == (
        None,
        None,
        None,
    )
    assert (gone["attention"]["n_heads_in_group"], gone["attention"]["unshifted_sink"]) == (None, None)


def test_per_layer_is_sparse_and_its_keys_are_padded():
    base = {**LLAMA, "num_hidden_layers": 12}
    blocks = [BlockConfig(AttentionConfig(4), FFNConfig(1024))] * 12
    blocks[2] = BlockConfig(AttentionConfig(4), FFNConfig(512))
    blocks[11] = BlockConfig(AttentionConfig(no_op=True), FFNConfig(no_op=True))
    assert write_block_configs(blocks, "per-layer", base) == {
        "per_layer_config": {"02": {"intermediate_size": 512}, "11": {"skip": ["attention", "mlp"]}}
    }


def test_writing_leaves_the_config_and_the_blocks_as_they_are():
    base = json.loads(json.dumps(LLAMA))
    blocks = [BlockConfig()] * 4
    for dialect in Dialect:
        write_block_configs(blocks, dialect, base)
    assert base == LLAMA
    assert blocks == [BlockConfig()] * 4


# --- Nemotron-NAS arithmetic


@pytest.mark.parametrize(
    ("ffn_mult", "hidden_size", "width"),
    [
        (5.25, 8192, 28672),
        (2.625, 8192, 14336),
        (1.3125, 8192, 7168),
        (1.0, 8192, 5632),
        (0.4875, 16384, 5376),
    ],
)
def test_ffn_mult_says_the_published_width(ffn_mult, hidden_size, width):
    assert width_of(ffn_mult, hidden_size) == width


@given(hidden_size=st.integers(1, 512).map(lambda n: 32 * n), multiple=st.integers(1, 600))
def test_every_multiple_of_256_can_be_said_in_six_decimals(hidden_size, multiple):
    ffn_mult = ffn_mult_of(256 * multiple, hidden_size)
    assert width_of(ffn_mult, hidden_size) == 256 * multiple
    assert round(ffn_mult, 6) == ffn_mult


def test_the_original_ffn_mult_is_kept_while_it_says_the_width():
    base = {
        **LLAMA,
        "num_hidden_layers": 1,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": None,
    }
    raw = {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": 1.0}}
    [block] = parse_blocks([raw], base)
    assert block.ffn.intermediate_size == 5632
    for width, ffn_mult in ((5632, 1.0), (7168, 1.3125)):
        changed = BlockConfig(block.attention, FFNConfig(width, extra=block.ffn.extra))
        assert (
            write_block_configs([changed], "nemotron-nas", base)["block_configs"][0]["ffn"]["ffn_mult"]
            == ffn_mult
        )


def test_heads_that_do_not_divide_are_refused():
    raw = {"attention": {"n_heads_in_group": 3}, "ffn": {"ffn_mult": 1.0}}
    with pytest.raises(
        BlockConfigError, match=r"block 0: attention\.n_heads_in_group=3 does not divide num_attention_"
    ):
        parse_blocks([raw] * 4, LLAMA)
    with pytest.raises(
        BlockConfigError, match=r"block 1: attention\.num_key_value_heads=3 does not divide num_attenti"
    ):
        parse_blocks([BlockConfig(), BlockConfig(AttentionConfig(3))] * 2, LLAMA)


@pytest.mark.parametrize("ffn_mult", [0, -1.0, True, "2.625"])
def test_an_ffn_mult_that_says_no_width_is_refused(ffn_mult):
    with pytest.raises(BlockConfigError, match=r"block 0: ffn\.ffn_mult="):
        parse_blocks([{"ffn": {"ffn_mult": ffn_mult}}] * 4, LLAMA)


# --- any dialect → blocks → any dialect


def parts(kind, sizes, linear=True):
    gone = [kind(no_op=True)] + ([kind(replace_with_linear=True)] if linear else [])
    return st.one_of(st.sampled_from(gone), sizes.map(kind))


HEADS = st.sampled_from([None, 1, 2, 4, 8])
WIDTHS = st.one_of(st.none(), st.integers(1, 40).map(lambda n: 256 * n))


def dense_blocks(linear):
    attention, ffn = parts(AttentionConfig, HEADS, linear), parts(FFNConfig, WIDTHS, linear)
    return st.lists(st.builds(BlockConfig, attention, ffn), min_size=4, max_size=4)


@settings(max_examples=150, deadline=None)
@given(first=st.sampled_from(list(Dialect)), second=st.sampled_from(list(Dialect)), data=st.data())
def test_blocks_survive_any_dialect_and_any_other_after_it(first, second, data):
    blocks = data.draw(dense_blocks(linear=Dialect.PER_LAYER not in (first, second)))
    once = through(blocks, first, LLAMA)
    assert resolved(once, LLAMA) == resolved(blocks, LLAMA)
    assert resolved(through(once, second, LLAMA), LLAMA) == resolved(blocks, LLAMA)


@settings(max_examples=60, deadline=None)
@given(
    dialects=st.permutations([Dialect.ANYMODEL, Dialect.TRANSITIONAL, Dialect.PER_LAYER]),
    experts=st.integers(2, 64),
    visited=st.integers(1, 2),
    width=st.integers(1, 4096),
)
def test_experts_survive_the_dialects_that_can_say_them(dialects, experts, visited, width):
    block = BlockConfig(ffn=FFNConfig(moe=MoEConfig(experts, visited, width)))
    dense = BlockConfig(AttentionConfig(2), FFNConfig(512))
    blocks = [block, dense, BlockConfig(AttentionConfig(no_op=True), block.ffn), block]
    expected = MoEConfig(experts, visited, width, 0)
    for dialect in dialects:
        blocks = through(blocks, dialect, QWEN3_MOE)
        base = BaseSizes.of(QWEN3_MOE)
        # A block whose experts are the base config's is left out of the sparse form and comes back unsaid.
        said = [resolve_block(b, base).ffn.moe if b.ffn.moe else MoEConfig(8, 2, 256, 0) for b in blocks[::2]]
        assert said == [expected, expected]
        assert blocks[1] == dense
        assert blocks[2].attention.no_op
        blocks = [BlockConfig(b.attention, FFNConfig(moe=expected)) if b != dense else b for b in blocks]


def test_mixtral_says_expert_widths_under_the_dense_name():
    base = {**LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2}
    blocks = [BlockConfig(), *[BlockConfig(ffn=FFNConfig(moe=MoEConfig(4, None, 512)))] * 3]
    written = write_block_configs(blocks, "per-layer", base)
    assert written["per_layer_config"]["1"] == {"num_local_experts": 4, "intermediate_size": 512}
    assert through(blocks, Dialect.PER_LAYER, base) == blocks


def test_the_shared_width_that_nvidias_package_writes_for_families_without_one_is_carried():
    moe = {"num_local_experts": 8, "num_experts_per_tok": 2, "expert_intermediate_dim": 128}
    raw = {"ffn": {"moe": {**moe, "shared_expert_intermediate_dim": 8192}}}
    blocks = parse_blocks([raw] * 4, QWEN3_MOE)
    assert (
        write_block_configs(blocks, "anymodel", QWEN3_MOE)["block_configs"][0]["ffn"]["moe"]
        == raw["ffn"]["moe"]
    )
    assert write_block_configs(blocks, "per-layer", QWEN3_MOE)["per_layer_config"]["0"] == {
        "moe_intermediate_size": 128
    }


def test_fields_that_say_nothing_are_carried_as_they_were():
    attention = {"n_heads_in_group": None, "no_op": True, "unshifted_sink": None, "window_length": None}
    raw = {"attention": attention, "ffn": {"ffn_mult": 3.0, "sparsify": None}}
    base = {**LLAMA, "num_hidden_layers": 1}
    [block] = parse_blocks([raw], base)
    written = write_block_configs([block], "nemotron-nas", base)["block_configs"][0]["attention"]
    assert written["unshifted_sink"] is None
    assert written["use_prefill_window_in_sink_attention"] is False


def test_a_removed_attention_may_carry_an_irrelevant_size_and_window():
    attention = {"n_heads_in_group": 5, "no_op": True, "window_length": 128}
    blocks = parse_blocks([{"attention": attention, "ffn": {"ffn_mult": 1.5, "no_op": True}}] * 4, LLAMA)
    assert blocks[0] == BlockConfig(AttentionConfig(no_op=True), FFNConfig(no_op=True))
    [written, *_] = write_block_configs(blocks, "nemotron-nas", LLAMA)["block_configs"]
    assert (written["attention"]["window_length"], written["ffn"]["ffn_mult"]) == (None, None)


# --- transformers


def test_transformers_takes_our_per_layer_config_and_we_take_its():
    from transformers import LlamaConfig

    blocks = [BlockConfig()] * 12
    blocks[3] = BlockConfig(AttentionConfig(2), FFNConfig(no_op=True))
    blocks[10] = BlockConfig(AttentionConfig(no_op=True), FFNConfig(512))
    base = {key: value for key, value in LLAMA.items() if key != "model_type"} | {"num_hidden_layers": 12}
    written = write_block_configs(blocks, "per-layer", base)
    config = LlamaConfig(**base, **written)
    assert config.per_layer_config[3].num_key_value_heads == 2
    assert config.per_layer_config[3].skip == ["mlp"]
    assert config.per_layer_config[10].intermediate_size == 512
    theirs = config.to_dict()
    assert theirs["per_layer_config"] == written["per_layer_config"]
    assert read_block_configs(theirs) == (blocks, Dialect.PER_LAYER)
    config.serialize_explicit_per_layer_config = True
    assert resolved(read_block_configs(config.to_dict())[0], base) == resolved(blocks, base)


# --- detection


@pytest.mark.parametrize(
    ("blocks", "dialect"),
    [
        ([{"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": 2.625}}], "nemotron-nas"),
        ([{"attention": {"no_op": True}, "ffn": {"ffn_mult": 2.625}}], "nemotron-nas"),
        ([{"attention": {"n_heads_in_group": 8}, "ffn": {"intermediate_size": 256}}], "transitional"),
        ([{"attention": {"no_op": True}}, {"attention": {"num_key_value_heads": 2}}], "anymodel"),
        ([{"ffn": {"moe": {}}}], "anymodel"),
        ([{"attention": {"num_query_groups": 8}, "mlp": {"ffn_hidden_size": 256}}], "megatron"),
        ([{"attention": {"no_op": True}, "mlp": {"no_op": True}}], "megatron"),
        ([{"attention": {"no_op": True}, "ffn": {"no_op": True}}], "anymodel"),
    ],
)
def test_the_field_names_tell_the_dialect(blocks, dialect):
    assert detect_dialect({"block_configs": blocks}) == Dialect(dialect)


def test_a_model_without_any_attention_and_ffn_is_told_by_its_model_type():
    blocks = [{"attention": {"no_op": True}, "ffn": {"no_op": True}}]
    assert detect_dialect({"model_type": "nemotron-nas", "block_configs": blocks}) is Dialect.NEMOTRON_NAS


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, "block_configs": None}, {"text_config": LLAMA}])
def test_a_homogeneous_config_says_no_blocks(config):
    assert read_block_configs(config) is None


def test_megatron_json_may_hold_the_nemotron_notation():
    block = {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 3.0}}
    encoded = json.dumps({"block_configs": [block] * 4})
    found = read_block_configs({**LLAMA, "heterogeneous_layers_config_encoded_json": encoded})
    assert found == ([BlockConfig(AttentionConfig(2), FFNConfig(1024))] * 4, Dialect.MEGATRON)


def test_megatron_may_call_the_ffn_ffn_but_not_twice():
    block = {"attention": {"num_query_groups": 2}, "ffn": {"ffn_hidden_size": 512.0}}
    assert parse_blocks([block] * 4, LLAMA)[0] == BlockConfig(AttentionConfig(2), FFNConfig(512))
    with pytest.raises(BlockConfigError, match="ffn and mlp are two names of one part"):
        parse_blocks([{**block, "mlp": {}}] * 4, LLAMA)


# --- what a caller gives


def test_entries_of_different_dialects_mix():
    entries = [
        BlockConfig(AttentionConfig(2)),
        {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 3.0}},
        {"num_key_value_heads": 2, "skip": ["mlp"]},
        {"attention": {"num_query_groups": 2}, "mlp": {"no_op": True}},
    ]
    assert parse_blocks(entries, LLAMA) == [
        BlockConfig(AttentionConfig(2)),
        BlockConfig(AttentionConfig(2), FFNConfig(1024)),
        BlockConfig(AttentionConfig(2), FFNConfig(no_op=True)),
        BlockConfig(AttentionConfig(2), FFNConfig(no_op=True)),
    ]


def test_a_sparse_mapping_stands_for_all_layers():
    assert parse_blocks({2: {"skip": ["attention"]}, "03": {"intermediate_size": 512}}, LLAMA) == [
        BlockConfig(),
        BlockConfig(),
        BlockConfig(AttentionConfig(no_op=True)),
        BlockConfig(ffn=FFNConfig(512)),
    ]


def test_a_part_that_is_left_out_is_as_the_base_config_says_and_null_is_refused():
    assert parse_blocks([{"ffn": {"no_op": True}}] * 4, LLAMA)[0] == BlockConfig(ffn=FFNConfig(no_op=True))
    assert parse_blocks([{}] * 4, LLAMA) == [BlockConfig()] * 4
    with pytest.raises(
        BlockConfigError, match=r"block 0: attention is None, which may mean .*\"no_op\": true"
    ):
        parse_blocks([{"attention": None, "ffn": {"no_op": True}}] * 4, LLAMA)


@pytest.mark.parametrize(("number", "few_or_many"), [(3, "few"), (5, "many"), (0, "few")])
def test_too_few_or_too_many_blocks_are_refused_with_both_numbers(number, few_or_many):
    message = f"too {few_or_many} block configs: {number} for num_hidden_layers=4"
    for take in (
        lambda blocks: parse_blocks(blocks, LLAMA),
        lambda blocks: write_block_configs(blocks, "anymodel", LLAMA),
        lambda blocks: read_block_configs({**LLAMA, "block_configs": blocks}),
    ):
        with pytest.raises(BlockConfigError, match=message):
            take([BlockConfig()] * number)


NULL_BLOCK = {"attention": {"num_key_value_heads": 2}, "ffn": {"intermediate_size": 256}}


def entry(attention=(), ffn=(), **block):
    return {
        "attention": {**NULL_BLOCK["attention"], **dict(attention)},
        "ffn": {**NULL_BLOCK["ffn"], **dict(ffn)},
        **block,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (entry({"window_length": 128}), "attention.window_length=128 asks for a window of its own"),
        (entry({"num_sink_tokens": 4}), "attention.num_sink_tokens=4 asks for attention sinks"),
        (entry({"llama4": {"use_rope": True}}), "attention.llama4={'use_rope': True} asks for Llama 4"),
        (entry({"mamba": {"state_dim": 8}}), "attention.mamba={'state_dim': 8} asks for a state-space mixer"),
        (entry({"sparsify": ["2:4"]}), "attention.sparsify=['2:4'] asks for sparse weights"),
        (entry((), {"sparsify": ["2:4"]}), "ffn.sparsify=['2:4'] asks for sparse weights"),
        (entry(parallel_blocks=[NULL_BLOCK]), "block.parallel_blocks=[{"),
        (entry((), {"hidden_act": "gelu"}), "ffn.hidden_act='gelu' differs from hidden_act"),
        (entry((), {"gated": False}), "ffn.gated=False asks for an FFN without a gate"),
        (entry((), {"intermediate_sise": 4}), "'intermediate_sise' of ffn is not a field of the anymodel "
         "dialect; did you mean 'intermediate_size'?"),
        (entry({"head_dim": 4}), "'head_dim' of attention is not a field of the anymodel dialect"),
        (entry(mpl={}), "'mpl' of the block is not a field of the anymodel dialect"),
        (entry({"n_heads_in_group": 4}), "'num_key_value_heads' of attention is not a field of the tra"),
        (entry((), {"moe": 8, "intermediate_size": None}), "ffn.moe=8 is not a mapping"),
        (entry((), {"moe": {"num_experts": 8}}), "'num_experts' of ffn.moe is not a field"),
        (entry((), {"moe": {"num_local_experts": 8}}), "ffn.moe and ffn.intermediate_size=256 are both set"),
        (entry({"no_op": "yes"}), "attention.no_op='yes' is not true or false"),
        ({"attention": {"n_heads_in_group": None}, "ffn": {"ffn_mult": 1.5}}, "attention.n_heads_in_group is "
         "null, but the part is neither no_op nor replace_with_linear"),
        ({"attention": {"no_op": True}, "ffn": {"ffn_mult": None}}, "ffn.ffn_mult is null, but the part"),
        ({"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.5, "intermediate_size": 256}},
         "ffn.intermediate_size=256, but ffn.ffn_mult=1.5 says 512"),
        ({"subblock_configs": []}, "subblock_configs is the typed list of later Puzzletron versions"),
        ({"intermediate_size": 512, "head_dim": 4}, "'head_dim' of the layer is not a field of"),
        ({"skip": ["feed_forward"]}, "skip names feed_forward; what can be skipped is attention and mlp"),
        ({"skip": "mlp"}, "skip='mlp' is not a list of names"),
        ([], "expected a BlockConfig or a mapping, found []"),
        (BlockConfig(AttentionConfig(mamba=MambaConfig(1, 2, 3, 4))), "asks for a state-space mixer, which"),
        (BlockConfig(ffn=FFNConfig(extra={"gated": False})), "ffn.gated=False asks for"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_refused_naming_block_and_field(wrong, message):
    with pytest.raises(BlockConfigError) as caught:
        parse_blocks([BlockConfig(), BlockConfig(), wrong, BlockConfig()], LLAMA)
    assert str(caught.value).startswith("block 2: ")
    assert message in str(caught.value)


def test_fewer_experts_than_a_token_visits_are_refused():
    few = {"ffn": {"moe": {"num_local_experts": 1}}}
    with pytest.raises(
        BlockConfigError, match=r"block 0: ffn\.moe\.num_local_experts=1 is less than num_experts_per_tok"
    ):
        parse_blocks([few] * 4, QWEN3_MOE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"4": {}}, "per_layer_config has the key '4'; its keys are the layers 0 to 3"),
        ({-1: {}}, "per_layer_config has the key -1"),
        ({"first": {}}, "per_layer_config has the key 'first'"),
        ({"1": {}, "01": {}}, "per_layer_config says layer 1 twice"),
        (
            {1: {"sliding_window": 8}},
            "block 1: 'sliding_window' of the layer is not a field of the per-layer dialect",
        ),
        ({1: 512}, "block 1: an entry of per_layer_config must be a mapping, found 512"),
        ([], "per_layer_config must be a mapping of layers, found list"),
    ],
)
def test_a_wrong_per_layer_config_is_refused(overrides, message):
    with pytest.raises(BlockConfigError) as caught:
        read_block_configs({**LLAMA, "per_layer_config": overrides})
    assert message in str(caught.value)


@pytest.mark.parametrize("encoded", ["{", "[]", "{}", '{"block_configs": 4}'])
def test_broken_megatron_json_is_refused_naming_the_field(encoded):
    with pytest.raises(BlockConfigError, match="block_configs"):
        read_block_configs({**LLAMA, "heterogeneous_layers_config_encoded_json": encoded})


def test_block_configs_that_are_no_list_are_refused():
    with pytest.raises(
        BlockConfigError, match="block_configs must be a list with one entry a layer, found dict"
    ):
        read_block_configs({**LLAMA, "block_configs": {"0": NULL_BLOCK}})


def test_a_per_layer_field_that_repeats_the_base_value_says_nothing():
    base = {**LLAMA, "head_dim": 64}
    assert parse_blocks({0: {"head_dim": 64}}, base) == [BlockConfig()] * 4


# --- what a dialect cannot say

LINEAR = BlockConfig(AttentionConfig(replace_with_linear=True))
ODD = BlockConfig(ffn=FFNConfig(300))
EXPERTS = BlockConfig(ffn=FFNConfig(moe=MoEConfig(8, 2, 256)))
FP8 = BlockConfig(AttentionConfig(4, extra={"weights_precision": "fp8"}))


@pytest.mark.parametrize(
    ("block", "dialect", "message"),
    [
        (LINEAR, "per-layer", "attention.replace_with_linear cannot be said in per-layer"),
        (ODD, "nemotron-nas", "ffn.intermediate_size=300 cannot be said as ffn_mult, whose widths are "
         "multiples of 256; choose 512"),
        (ODD, "transitional", "ffn.intermediate_size=300 cannot be said in transitional"),
        (EXPERTS, "nemotron-nas", "ffn.moe cannot be said in nemotron-nas"),
        (EXPERTS, "megatron", "ffn.moe cannot be said in megatron"),
        (EXPERTS, "per-layer", "ffn.moe cannot be said in per-layer, since the base config"),
        (FP8, "nemotron-nas", "attention.weights_precision='fp8' cannot be said in nemotron-nas"),
        (FP8, "per-layer", "attention.weights_precision='fp8' cannot be said in per-layer"),
    ],
)  # fmt: skip
def test_what_a_dialect_cannot_say_is_refused_naming_block_and_field(block, dialect, message):
    with pytest.raises(BlockConfigError) as caught:
        write_block_configs([BlockConfig(), block, BlockConfig(), BlockConfig()], dialect, LLAMA)
    assert str(caught.value).startswith("block 1: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("ffn", "message"),
    [
        (
            FFNConfig(1024),
            "that this block is dense cannot be said in per-layer, since intermediate_size of the base",
        ),
        (
            FFNConfig(moe=MoEConfig(8, 2, 256, 512)),
            "ffn.moe.shared_expert_intermediate_dim=512 cannot be said in per-",
        ),
    ],
)
def test_per_layer_refuses_what_would_come_back_as_something_else(ffn, message):
    with pytest.raises(BlockConfigError) as caught:
        write_block_configs([BlockConfig(ffn=ffn)] * 4, "per-layer", QWEN3_MOE)
    assert message in str(caught.value)


def test_anymodel_leaves_out_what_neither_block_nor_base_says():
    base = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    blocks = [BlockConfig(), BlockConfig(AttentionConfig(no_op=True), FFNConfig(48))]
    first, second = write_block_configs(blocks, "anymodel", base)["block_configs"]
    assert {"attention", "ffn"} & set(first) == set()
    assert second["attention"]["no_op"] is True
    assert second["ffn"]["intermediate_size"] == 48
    assert through(blocks, Dialect.ANYMODEL, base) == blocks


@pytest.mark.parametrize("dialect", ["nemotron-nas", "transitional"])
def test_a_size_that_neither_block_nor_base_says_is_refused(dialect):
    with pytest.raises(
        BlockConfigError, match=r"block 0: attention\.num_key_value_heads is not set, and the base conf"
    ):
        write_block_configs([BlockConfig()] * 4, dialect, {**LLAMA, "num_key_value_heads": None})


def test_an_unknown_dialect_is_refused_with_the_known_ones():
    with pytest.raises(
        BlockConfigError, match=r"'deci' is not a dialect; known dialects: nemotron-nas, transitional"
    ):
        write_block_configs([BlockConfig()] * 4, "deci", LLAMA)


# --- two fields in one config


def test_two_fields_that_agree_are_read_once():
    blocks = [
        BlockConfig(),
        BlockConfig(AttentionConfig(2), FFNConfig(no_op=True)),
        BlockConfig(),
        BlockConfig(),
    ]
    both = write_block_configs(blocks, "anymodel", LLAMA) | write_block_configs(blocks, "per-layer", LLAMA)
    read, dialect = read_block_configs({**LLAMA, **both})
    assert dialect is Dialect.ANYMODEL
    assert resolved(read, LLAMA) == resolved(blocks, LLAMA)
    assert set(both) < set(CONFIG_FIELDS)


def test_two_fields_that_disagree_are_refused():
    blocks = [BlockConfig(ffn=FFNConfig(512))] * 4
    both = write_block_configs(blocks, "anymodel", LLAMA) | {
        "per_layer_config": {"0": {"intermediate_size": 512}}
    }
    with pytest.raises(
        BlockConfigError, match=r"block 1: block_configs says .*512.*, but per_layer_config says"
    ):
        read_block_configs({**LLAMA, **both})


@pytest.mark.parametrize(
    "nested",
    [
        {"text_config": {**LLAMA, "per_layer_config": {"0": {"skip": ["mlp"]}}}},
        {"text_config": LLAMA, "block_configs": [NULL_BLOCK] * 4},
    ],
)
def test_nested_configs_are_refused_with_what_to_pass(nested):
    with pytest.raises(BlockConfigError, match=r"nested \(vision-language\).*pass config\['text_config'\]"):
        read_block_configs(nested)


def test_dialects_and_inference_import_neither_torch_nor_transformers_nor_numpy():
    heavy = {"torch", "transformers", "numpy"}
    code = f"import sys, patchers.dialects, patchers.inference; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
