"""Inside the patcher, native classes build the blocks that the block configs describe."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compare import assert_same_tensors
from support.families import family_config
from support.tiny import FAMILIES, heterogeneous_checkpoint, tensors_of, tiny_checkpoint, tiny_config
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM
from transformers.integrations import heterogeneity
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from patchers import AttentionConfig, BlockConfig, FFNConfig, ModelDescriptor, deci_x_patcher
from patchers.deci_x import as_described, blocks_of
from patchers.errors import BlockConfigError, FamilyError, PatchError
from patchers.substitutes import LinearAttention, LinearFFN, NoAttention, NoFFN, NoNorm
from sharded_ckpt import load_model_config

KINDS = [
    BlockConfig(AttentionConfig(4), FFNConfig(32)),
    BlockConfig(AttentionConfig(no_op=True), FFNConfig(48)),
    BlockConfig(AttentionConfig(1), FFNConfig(no_op=True)),
    BlockConfig(AttentionConfig(replace_with_linear=True), FFNConfig(replace_with_linear=True)),
    BlockConfig(AttentionConfig(no_op=True), FFNConfig(no_op=True)),
    BlockConfig(),
]
IDS = torch.arange(24).reshape(2, 12)


def build(family: str = "llama", blocks: Any = KINDS, **config: Any) -> Any:
    native = tiny_config(family, layers=config.pop("layers", len(KINDS)), **config)
    with deci_x_patcher(family, blocks), torch.device("meta"):
        return AutoModelForCausalLM.from_config(native)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_block_is_built(family: str) -> None:
    layers = build(family).model.layers
    assert layers[0].self_attn.k_proj.weight.shape == (64, 64)
    assert layers[0].mlp.up_proj.weight.shape == (32, 64)
    assert isinstance(layers[1].self_attn, NoAttention)
    assert isinstance(layers[1].input_layernorm, NoNorm)
    assert layers[1].mlp.down_proj.weight.shape == (64, 48)
    assert layers[2].self_attn.v_proj.weight.shape == (16, 64)
    assert isinstance(layers[2].mlp, NoFFN)
    assert isinstance(layers[2].post_attention_layernorm, NoNorm)
    assert isinstance(layers[3].self_attn, LinearAttention)
    assert isinstance(layers[3].mlp, LinearFFN)
    assert layers[3].input_layernorm.weight.shape == layers[3].post_attention_layernorm.weight.shape == (64,)
    assert list(layers[4].parameters()) == []
    assert layers[5].self_attn.k_proj.weight.shape == (32, 64)
    assert layers[5].mlp.up_proj.weight.shape == (96, 64)


def test_removed_parts_take_their_norms_and_parameters_along() -> None:
    names = {name.split(".", 3)[3] for name in build().state_dict() if name.startswith("model.layers.1.")}
    assert names == {
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "post_attention_layernorm.weight",
    }


@pytest.mark.parametrize(
    "blocks",
    [
        [{"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 6.0}}, {"attention": {"no_op": True}}],
        [
            {"attention": {"num_key_value_heads": 1}, "ffn": {"intermediate_size": 256}},
            BlockConfig(AttentionConfig(no_op=True)),
        ],
        [
            {"attention": {"num_query_groups": 1}, "mlp": {"ffn_hidden_size": 256}},
            {"attention": {"no_op": True}},
        ],
        {0: {"num_key_value_heads": 1, "intermediate_size": 256}, "01": {"skip": ["attention"]}},
    ],
    ids=["nemotron-nas", "anymodel-and-objects", "megatron", "per-layer"],
)
def test_block_configs_may_come_in_any_dialect(blocks: Any) -> None:
    with deci_x_patcher("llama", blocks), torch.device("meta"):
        layers = LlamaForCausalLM(tiny_config(layers=2)).model.layers
    assert layers[0].self_attn.k_proj.weight.shape == (16, 64)
    assert layers[0].mlp.up_proj.weight.shape == (256, 64)
    assert isinstance(layers[1].self_attn, NoAttention)


def test_layer_index_is_the_argument_even_inside_a_users_own_loop() -> None:
    config = tiny_config(layers=6)
    with deci_x_patcher("llama", KINDS), torch.device("meta"):
        for idx in [0]:
            layer_idx = idx + 2
            built = LlamaDecoderLayer(config, 1), LlamaDecoderLayer(config, layer_idx=5)
    assert layer_idx == 2
    assert built[0].mlp.up_proj.weight.shape == (48, 64)
    assert built[1].mlp.up_proj.weight.shape == (96, 64)


def test_single_layer_runs_with_its_own_sizes() -> None:
    config = tiny_config(layers=6)
    config._attn_implementation = "eager"
    with deci_x_patcher("llama", KINDS):
        layer = LlamaDecoderLayer(config, 1)
    hidden = torch.randn(1, 3, 64)
    with torch.no_grad():
        assert torch.equal(layer(hidden), hidden + layer.mlp(layer.post_attention_layernorm(hidden)))


class OwnLayer(LlamaDecoderLayer):
    def __init__(self, config: LlamaConfig, layer_idx: int, note: str = "own") -> None:
        super().__init__(config, layer_idx)
        self.note = note


def test_subclasses_of_the_decoder_layer_are_patched_too() -> None:
    with deci_x_patcher("llama", KINDS), torch.device("meta"):
        layer = OwnLayer(tiny_config(layers=6), 1, note="mine")
    assert isinstance(layer.self_attn, NoAttention)
    assert layer.note == "mine"


def test_subclass_and_base_patched_together_are_built_once() -> None:
    descriptor = ModelDescriptor.from_family("llama")
    both = dataclasses.replace(descriptor, layer_classes=(OwnLayer, LlamaDecoderLayer))
    with deci_x_patcher(both, KINDS), torch.device("meta"):
        layer = OwnLayer(tiny_config(layers=6), 0)
    assert layer.mlp.up_proj.weight.shape == (32, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_load_anymodel_checkpoints_inside(tmp_path: Path, family: str) -> None:
    folder = heterogeneous_checkpoint(tmp_path, family)
    with deci_x_patcher(family):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    saved = tensors_of(folder)
    assert set(saved) == {n for n in model.state_dict() if not n.endswith("inv_freq")}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def test_nemotron_nas_loads_by_auto_class_with_its_config(tmp_path: Path) -> None:
    folder = heterogeneous_checkpoint(tmp_path, dialect="nemotron_nas")
    with deci_x_patcher("nemotron-nas"):
        model = AutoModelForCausalLM.from_pretrained(folder, config=load_model_config(folder))
    saved = tensors_of(folder)
    assert set(saved) == set(model.state_dict())
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def test_native_per_layer_configs_are_built_and_run() -> None:
    overrides = {1: {"num_key_value_heads": 1, "intermediate_size": 32}, 2: {"skip": ["mlp"]}}
    config = tiny_config(layers=3, per_layer_config=overrides)
    with deci_x_patcher("llama"):
        model = LlamaForCausalLM(config).eval()
    layers = model.model.layers
    assert layers[0].mlp.up_proj.weight.shape == (96, 64)
    assert layers[1].mlp.up_proj.weight.shape == (32, 64)
    assert layers[1].self_attn.k_proj.weight.shape == (16, 64)
    assert isinstance(layers[2].mlp, NoFFN)
    with torch.no_grad():
        whole = model(IDS).logits
        tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    assert whole.isfinite().all()
    assert tokens.shape == (2, 15)


def test_stands_aside_when_transformers_builds_them_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heterogeneity, "apply_heterogeneous_modeling", object(), raising=False)
    config = tiny_config(layers=2, per_layer_config={1: {"skip": ["mlp"]}})
    with deci_x_patcher("llama"), torch.device("meta"):
        layers = LlamaForCausalLM(config).model.layers
    assert not isinstance(layers[1].mlp, NoFFN)


def test_config_that_says_nothing_builds_as_ever() -> None:
    config = tiny_config(layers=2)
    with deci_x_patcher("llama"), torch.device("meta"):
        inside = LlamaForCausalLM(config)
    with torch.device("meta"):
        outside = LlamaForCausalLM(config)
    assert {n: t.shape for n, t in inside.state_dict().items()} == {
        n: t.shape for n, t in outside.state_dict().items()
    }
    assert (
        type(inside.model.layers[0].mlp.config if hasattr(inside.model.layers[0].mlp, "config") else config)
        is LlamaConfig
    )


def test_argument_wins_over_the_config(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(heterogeneous_checkpoint(tmp_path, blocks=[(2, 96), ("no_op", 96)]))
    with deci_x_patcher("llama", [BlockConfig(), BlockConfig()]), torch.device("meta"):
        assert not isinstance(LlamaForCausalLM(config).model.layers[1].self_attn, NoAttention)
    with deci_x_patcher("llama"), torch.device("meta"):
        assert isinstance(LlamaForCausalLM(config).model.layers[1].self_attn, NoAttention)


def test_config_is_not_changed() -> None:
    config = tiny_config(layers=6)
    before = copy.deepcopy(config.to_dict())
    with deci_x_patcher("llama", KINDS), torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert {k: v for k, v in model.config.to_dict().items() if k != "dtype"} == {
        k: v for k, v in before.items() if k != "dtype"
    }


def test_config_that_is_changed_between_two_models_is_read_again() -> None:
    config = tiny_config(layers=2)
    config.block_configs = [{"ffn": {"intermediate_size": 16}}] * 2
    with deci_x_patcher("llama"), torch.device("meta"):
        assert LlamaForCausalLM(config).model.layers[1].mlp.up_proj.out_features == 16
        config.block_configs[1] = {"ffn": {"intermediate_size": 24}}
        assert LlamaForCausalLM(config).model.layers[1].mlp.up_proj.out_features == 24


@pytest.mark.parametrize("count", [4, 7])
def test_wrong_number_of_block_configs_names_both_numbers(count: int) -> None:
    with pytest.raises(BlockConfigError, match=rf"{count}.*6"):
        build(blocks=(KINDS * 2)[:count])


@pytest.mark.parametrize("index", [-1, 6, "0", None])
def test_layer_index_out_of_range_is_refused(index: Any) -> None:
    with (
        deci_x_patcher("llama", KINDS),
        pytest.raises(BlockConfigError, match=re.escape(f"layer index {index!r}; there are 6")),
    ):
        LlamaDecoderLayer(tiny_config(layers=6), index)


@pytest.mark.parametrize("field", ["head_dim", "sliding_window"])
def test_fields_that_layers_do_not_honour_are_refused_by_name(field: str) -> None:
    config = tiny_config("mistral", layers=2, per_layer_config={1: {field: 8}})
    with deci_x_patcher("mistral"), torch.device("meta"), pytest.raises(BlockConfigError, match=field):
        AutoModelForCausalLM.from_config(config)


class StubbornLayer(LlamaDecoderLayer):
    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=96))


def test_an_override_that_changes_nothing_is_an_error() -> None:
    stubborn = dataclasses.replace(ModelDescriptor.from_family("llama"), layer_classes=(StubbornLayer,))
    expected = "block 0 asks for intermediate_size=32, but in llama no config field moves the FFN width of"
    with deci_x_patcher(stubborn, KINDS), pytest.raises(FamilyError, match=expected):
        StubbornLayer(tiny_config(layers=6), 0)


class FickleLayer(LlamaDecoderLayer):
    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if layer_idx == 1:
            self.mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=96))


def test_what_was_built_is_compared_with_what_was_asked_for() -> None:
    fickle = dataclasses.replace(ModelDescriptor.from_family("llama"), layer_classes=(FickleLayer,))
    blocks = [BlockConfig(ffn=FFNConfig(32))] * 2
    expected = (
        "block 1 asks for intermediate_size=32, but FickleLayer built 96: its family does not honour "
        "intermediate_size layer by layer"
    )
    config = tiny_config(layers=2)
    with deci_x_patcher(fickle, blocks):
        FickleLayer(config, 0)
        with pytest.raises(PatchError, match=expected):
            FickleLayer(config, 1)


def test_removal_is_refused_where_zeros_would_be_wrong() -> None:
    descriptor = ModelDescriptor.from_family("llama")
    assert descriptor.ffn is not None
    (kind,) = descriptor.layer_kinds
    unsafe_kind = dataclasses.replace(kind, ffn=(dataclasses.replace(kind.ffn[0], removable=False),))
    unsafe = dataclasses.replace(descriptor, probe=lambda: (unsafe_kind,))
    with (
        deci_x_patcher(unsafe, KINDS),
        pytest.raises(FamilyError, match=r"block 2 removes its FFN.*silently wrong"),
    ):
        LlamaDecoderLayer(tiny_config(layers=6), 2)


def test_experts_are_refused_by_name() -> None:
    blocks = [{"attention": {"num_key_value_heads": 2}, "ffn": {"moe": {"num_local_experts": 4}}}]
    with (
        deci_x_patcher("llama", blocks),
        pytest.raises(
            FamilyError,
            match=r"block 0 asks for experts \(ffn.moe\), but in llama this layer is no mixture of experts",
        ),
    ):
        LlamaDecoderLayer(tiny_config(layers=1), 0)


def test_attention_implementation_stays_one_and_causal_after_a_switch() -> None:
    with deci_x_patcher("llama", KINDS):
        model = LlamaForCausalLM(tiny_config(layers=6)).eval()
    logits = {}
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        configs = [m.config for m in model.modules() if hasattr(m, "config")]
        assert {config._attn_implementation for config in configs} == {name}
        with torch.no_grad():
            logits[name] = model(IDS).logits
            assert torch.allclose(model(IDS[:, :6]).logits, logits[name][:, :6], atol=1e-5), (
                "the future leaks in"
            )
    assert torch.allclose(logits["sdpa"], logits["eager"], atol=1e-5)


def test_two_models_of_two_families_at_once() -> None:
    with deci_x_patcher("llama", KINDS), deci_x_patcher("qwen3", KINDS[::-1]), torch.device("meta"):
        llama = LlamaForCausalLM(tiny_config("llama", layers=6))
        qwen = Qwen3ForCausalLM(tiny_config("qwen3", layers=6))
    assert isinstance(llama.model.layers[1].self_attn, NoAttention)
    assert isinstance(qwen.model.layers[4].self_attn, NoAttention)


def test_nested_use_counts_and_then_the_outer_one_again() -> None:
    config = tiny_config(layers=1)
    with deci_x_patcher("llama", [BlockConfig(ffn=FFNConfig(16))]), torch.device("meta"):
        with deci_x_patcher("llama", [BlockConfig(ffn=FFNConfig(32))]):
            assert LlamaDecoderLayer(config, 0).mlp.up_proj.out_features == 32
        assert LlamaDecoderLayer(config, 0).mlp.up_proj.out_features == 16


def test_threads_build_their_own_models_at_once() -> None:
    config, widths = tiny_config(layers=8), (8, 16, 24)
    barrier, built = threading.Barrier(len(widths), timeout=30), {}

    def work(width: int) -> None:
        with deci_x_patcher("llama", [BlockConfig(ffn=FFNConfig(width))] * 8):
            barrier.wait()
            built[width] = [LlamaDecoderLayer(config, i).mlp.up_proj.out_features for i in range(8)]

    threads = [threading.Thread(target=work, args=(width,)) for width in widths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == {width: [width] * 8 for width in widths}


@pytest.mark.parametrize("leave", [lambda: None, lambda: (_ for _ in ()).throw(KeyError)])
def test_class_is_restored_however_the_block_ends(leave: Callable[[], Any]) -> None:
    true_init = LlamaDecoderLayer.__init__
    try:
        with deci_x_patcher("llama", KINDS):
            assert LlamaDecoderLayer.__init__ is not true_init
            next(iter(leave() or ()), None)
    except KeyError:
        pass
    assert LlamaDecoderLayer.__init__ is true_init


def test_failed_build_restores_too() -> None:
    true_init = LlamaDecoderLayer.__init__
    with pytest.raises(BlockConfigError):
        build(blocks=KINDS[:2])
    assert LlamaDecoderLayer.__init__ is true_init


def test_gradients_reach_every_parameter_of_every_kind_of_block() -> None:
    with deci_x_patcher("llama", KINDS):
        model = LlamaForCausalLM(tiny_config(layers=6))
    model.activation_checkpointing_enable()
    model.train()(IDS, labels=IDS).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_copy_of_a_model_is_independent_of_it() -> None:
    with deci_x_patcher("llama", KINDS):
        model = LlamaForCausalLM(tiny_config(layers=6)).eval()
    twin = copy.deepcopy(model)
    assert_same_tensors(twin, model)
    twin.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    assert twin.model.layers[0].self_attn.config._attn_implementation == "eager"


def test_saved_config_still_says_the_blocks(tmp_path: Path) -> None:
    folder = heterogeneous_checkpoint(tmp_path)
    with deci_x_patcher("llama"):
        model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    said, says = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert says["block_configs"] == said["block_configs"]
    assert isinstance(model.model.layers[0], nn.Module)


def test_plain_config_stays_plain(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    with deci_x_patcher("llama"):
        inside = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_tensors(inside, AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("where", ["asked", "outer", "text"])
def test_the_blocks_of_a_vision_language_model_are_those_of_its_language_model(where: str) -> None:
    config = family_config("gemma3")
    blocks = [{"ffn": {"intermediate_size": 32}}, {"attention": {"no_op": True}}, {}, {}]
    if where != "asked":
        (config if where == "outer" else config.text_config).block_configs = blocks
    descriptor = ModelDescriptor.from_config(config)
    with as_described(descriptor, config, blocks if where == "asked" else None), torch.device("meta"):
        model = descriptor.model_class(config)
    layers = model.get_submodule(descriptor.layers)
    assert [layers[index].mlp.up_proj.out_features for index in (0, 2)] == [32, 96]
    assert isinstance(layers[1].self_attn, NoAttention)


def test_blocks_that_a_nested_config_says_twice_must_agree() -> None:
    config = family_config("gemma3")
    config.block_configs, config.text_config.block_configs = [{}] * 4, [{"ffn": {"no_op": True}}] * 4
    with pytest.raises(BlockConfigError, match=r"block_configs and text_config\.block_configs disagree"):
        blocks_of(config)
