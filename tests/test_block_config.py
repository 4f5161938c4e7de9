"""Block configs are values: validated once, frozen, equal when they build the same."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from patchers.base_sizes import BaseSizes, FieldNames, resolve_block
from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig, MambaConfig, MoEConfig
from patchers.errors import BlockConfigError

LLAMA = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
}
MIXTRAL = {**LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2}


def test_repr_shows_only_what_was_set_and_evaluates_to_an_equal_block():
    block = BlockConfig(AttentionConfig(no_op=True), FFNConfig(moe=MoEConfig(num_local_experts=4)))
    assert repr(block) == (
        "BlockConfig(attention=AttentionConfig(no_op=True), "
        "ffn=FFNConfig(moe=MoEConfig(num_local_experts=4)))"
    )
    assert eval(repr(block)) == block
    assert repr(BlockConfig()) == "BlockConfig()"


def test_blocks_are_hashable_frozen_and_survive_pickle_and_deepcopy():
    block = BlockConfig(
        AttentionConfig(2, extra={"window_length": None}), FFNConfig(96, extra={"ffn_mult": 2.25})
    )
    assert {block: 1}[BlockConfig(AttentionConfig(2), FFNConfig(96))] == 1
    for twin in (pickle.loads(pickle.dumps(block)), copy.deepcopy(block)):
        assert twin == block
        assert twin.ffn.extra == (("ffn_mult", 2.25),)
    with pytest.raises(dataclasses.FrozenInstanceError):
        block.attention.no_op = True


def test_no_op_and_linear_null_the_sizes():
    for gone in ({"no_op": True}, {"replace_with_linear": True}):
        assert AttentionConfig(num_key_value_heads=4, **gone) == AttentionConfig(**gone)
        assert FFNConfig(intermediate_size=96, **gone) == FFNConfig(**gone)
        assert FFNConfig(moe=MoEConfig(4), **gone).moe is None
        assert not FFNConfig(**gone).is_native
    assert FFNConfig().is_native


def test_whole_floats_are_the_same_size_and_anything_else_is_refused():
    assert FFNConfig(96.0) == FFNConfig(96)
    for wrong in (0, -8, 2.5, True, "96"):
        with pytest.raises(
            BlockConfigError, match=r"ffn\.intermediate_size=.* is not a positive whole number"
        ):
            FFNConfig(wrong)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: AttentionConfig(no_op=True, replace_with_linear=True),
            "attention.no_op and attention.replace_with_",
        ),
        (lambda: FFNConfig(no_op=1), "ffn.no_op=1 is not true or false"),
        (lambda: FFNConfig(96, moe=MoEConfig(4)), "the width of an expert is moe.expert_intermediate_dim"),
        (lambda: FFNConfig(moe={"num_local_experts": 4}), "ffn.moe must be a MoEConfig"),
        (lambda: MoEConfig(4, 8), "moe.num_experts_per_tok=8 is more than moe.num_local_experts=4"),
        (lambda: MoEConfig(shared_expert_intermediate_dim=-1), "is not a whole number of at least 0"),
        (
            lambda: AttentionConfig(no_op=True, mamba=MambaConfig(1, 2, 3, 4)),
            "attention.mamba excludes no_op",
        ),
        (lambda: MambaConfig(None, 2, 3, 4), "mamba.state_dim is missing"),
        (
            lambda: AttentionConfig(extra={"window_length": 128}),
            "attention.window_length=128 asks for a window",
        ),
        (
            lambda: AttentionConfig(extra={"num_sink_tokens": 0}),
            "attention.num_sink_tokens=0 asks for attention sinks",
        ),
        (
            lambda: AttentionConfig(extra={"head_dim": 8}),
            "'head_dim', which is not a field that is carried along",
        ),
        (lambda: FFNConfig(extra={"hidden_act": ["silu"]}), "is not a number, a string, true, false or null"),
    ],
)
def test_a_wrong_part_is_refused_by_name(build, message):
    with pytest.raises(BlockConfigError) as caught:
        build()
    assert message in str(caught.value)


@pytest.mark.parametrize("part", ["attention", "ffn"])
@pytest.mark.parametrize("value", [None, {"no_op": True}])
def test_a_part_that_is_none_or_a_dict_is_refused_with_what_to_write(part, value):
    with pytest.raises(
        BlockConfigError, match=rf"{part} must be \w+Config, found .*no_op=True\) for none at all"
    ):
        BlockConfig(**{part: value})


def test_resolving_takes_what_is_unsaid_from_the_base_config():
    base = BaseSizes.of(LLAMA)
    assert resolve_block(BlockConfig(), base) == BlockConfig(AttentionConfig(4), FFNConfig(96))
    said = BlockConfig(AttentionConfig(2), FFNConfig(no_op=True))
    assert resolve_block(said, base) == said


def test_resolving_a_mixture_of_experts_fills_its_sizes():
    base = BaseSizes.of({**MIXTRAL, "n_shared_experts": 2, "moe_intermediate_size": 24})
    resolved = resolve_block(BlockConfig(ffn=FFNConfig(moe=MoEConfig(num_local_experts=4))), base)
    assert resolved.ffn.moe == MoEConfig(4, 2, 24, 48)


def test_resolving_refuses_what_no_config_says():
    silent = BaseSizes.of({**LLAMA, "num_key_value_heads": None})
    with pytest.raises(
        BlockConfigError, match=r"attention\.num_key_value_heads is not set, and the base config does"
    ):
        resolve_block(BlockConfig(), silent)
    with pytest.raises(BlockConfigError, match="does not tell which blocks are dense"):
        resolve_block(BlockConfig(), BaseSizes.of(MIXTRAL))


def test_field_names_follow_the_family():
    assert FieldNames.of(LLAMA) == FieldNames()
    gpt2 = FieldNames.of(
        {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_inner": None, "activation_function": "gelu"}
    )
    assert (gpt2.num_hidden_layers, gpt2.intermediate_size, gpt2.hidden_act) == (
        "n_layer",
        "n_inner",
        "activation_function",
    )
    deepseek = FieldNames.of({"n_routed_experts": 64, "moe_intermediate_size": 24})
    assert (deepseek.num_experts, deepseek.expert_intermediate_size) == (
        "n_routed_experts",
        "moe_intermediate_size",
    )


def test_a_base_config_without_a_number_of_layers_is_refused():
    with pytest.raises(BlockConfigError, match="does not say num_hidden_layers"):
        BaseSizes.of({"hidden_size": 64})
    with pytest.raises(
        BlockConfigError, match=r"nests its text model in text_config.*pass config\['text_config'\]"
    ):
        BaseSizes.of({"text_config": LLAMA})
