"""Descriptors are derived from the classes, by rule."""

from __future__ import annotations

import pickle

import pytest
import torch
from support.families import VISION_FAMILIES, family_config
from support.tiny import FAMILIES, tiny_config
from torch import nn
from transformers import CONFIG_MAPPING, GPT2Config, LlamaConfig, PreTrainedConfig

from patchers import ModelDescriptor, SubBlock
from patchers.errors import ConfigError, FamilyError
from patchers.families import PLAIN_FAMILIES
from patchers.meta import build_on_meta
from patchers.native import find_layers, model_class_of
from patchers.probe import probe_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_shaped_families_are_found_out(family: str) -> None:
    config = tiny_config(family)
    descriptor = ModelDescriptor.from_config(config)
    assert descriptor.family == family
    assert descriptor.layers == "model.layers"
    assert (descriptor.embedding, descriptor.final_norm, descriptor.head) == (
        "model.embed_tokens",
        "model.norm",
        "lm_head",
    )
    assert [cls.__name__ for cls in descriptor.layer_classes] == [f"{family.title()}DecoderLayer"]
    assert descriptor.layer_arity == 0
    assert descriptor.attention == SubBlock("self_attn", 2, ("input_layernorm",), True)
    assert descriptor.ffn == SubBlock("mlp", 0, ("post_attention_layernorm",), True)


def test_layers_are_not_tried_out_before_somebody_asks() -> None:
    descriptor = ModelDescriptor.from_config(family_config("jamba"))
    sent = pickle.loads(pickle.dumps(descriptor))
    assert "layer_kinds" not in {**vars(descriptor), **vars(sent)}
    assert sent == descriptor
    assert sent.layer_kinds == descriptor.layer_kinds
    assert "layer_kinds" in vars(descriptor)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma3_text"])
def test_one_layer_of_a_kind_is_run_for_all(family: str) -> None:
    model = build_on_meta(
        ModelDescriptor.from_family(family).model_class, tiny_config(family), torch.bfloat16
    )
    _, layers = find_layers(model)
    runs: list[int] = []
    for number, layer in enumerate(layers):
        next(layer.children()).register_forward_hook(lambda *_, number=number: runs.append(number))
    probe_layers(model, layers)
    assert set(runs) == {0}
    assert all("forward" not in vars(layer) for layer in layers)


def test_every_family_taken_as_plain_is_tested() -> None:
    assert set(FAMILIES) == PLAIN_FAMILIES


def test_rules_carry_over_to_other_shapes() -> None:
    descriptor = ModelDescriptor.from_config(GPT2Config(n_embd=32, n_head=4, n_layer=2))
    assert (descriptor.layers, descriptor.embedding, descriptor.final_norm) == (
        "transformer.h",
        "transformer.wte",
        "transformer.ln_f",
    )
    assert descriptor.attention == SubBlock("attn", 2, ("ln_1",), True)


@pytest.mark.parametrize(
    ("family", "attention_norms", "ffn_norms"),
    [
        ("gemma2", ("input_layernorm",), ("pre_feedforward_layernorm",)),  # its other two norms read results
        ("phi", (), ()),  # one norm feeds attention and FFN
        ("olmo2", (), ()),  # norms after, not before
    ],
)
def test_norms_that_others_read_stay(family: str, attention_norms: tuple, ffn_norms: tuple) -> None:
    descriptor = ModelDescriptor.from_config(tiny_config(family))
    assert descriptor.attention is not None
    assert descriptor.ffn is not None
    assert (descriptor.attention.norms, descriptor.ffn.norms) == (attention_norms, ffn_norms)
    assert descriptor.attention.removable


class _NoResidualOutside(nn.Module):
    """Wraps a layer such that zeros in the place of its parts do not leave the identity."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        hidden_states = hidden_states * 0.5 + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def test_a_layer_that_is_not_the_identity_without_its_parts_is_found_out() -> None:
    config = tiny_config("llama", layers=1)
    descriptor = ModelDescriptor.from_config(config)
    model = build_on_meta(descriptor.model_class, config, torch.float32)
    model.model.layers[0] = _NoResidualOutside(model.model.layers[0])
    probe = probe_layers(model, model.model.layers)[0]
    assert not probe.attention[0].removable


def test_same_answer_for_any_size_and_depth() -> None:
    small, large = tiny_config("llama"), LlamaConfig(num_hidden_layers=80, hidden_size=8192)
    assert ModelDescriptor.from_config(small) == ModelDescriptor.from_config(large)


def test_config_is_left_alone() -> None:
    config = tiny_config("qwen3")
    before = config.to_dict()
    ModelDescriptor.from_config(config)
    assert config.to_dict() == before


def test_descriptor_argument_may_be_a_name_or_auto() -> None:
    config = tiny_config("qwen2")
    derived = ModelDescriptor.from_config(config)
    for argument in (derived, "qwen2", "auto"):
        assert ModelDescriptor.of(argument, config) == derived
    assert ModelDescriptor.of("nemotron-nas").family == "llama"


def test_wrong_descriptor_arguments_say_what_to_pass() -> None:
    with pytest.raises(ConfigError, match='"auto" needs a config'):
        ModelDescriptor.of("auto")
    with pytest.raises(ConfigError, match="knows no model family 'lama'"):
        ModelDescriptor.of("lama")
    with pytest.raises(ConfigError, match="of family 'llama', the config of family 'qwen3'"):
        ModelDescriptor.of("llama", tiny_config("qwen3"))
    with pytest.raises(ConfigError, match="not 7"):
        ModelDescriptor.of(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_language_model_inside_a_vision_language_model_is_found(family: str) -> None:
    config = family_config(family)
    descriptor = ModelDescriptor.from_config(config)
    assert descriptor.family == family
    assert descriptor.model_class.__name__.endswith("ForConditionalGeneration")
    inside = "language_model.model" if family == "llama4" else "model.language_model"
    assert (descriptor.layers, descriptor.embedding, descriptor.final_norm) == (
        f"{inside}.layers",
        f"{inside}.embed_tokens",
        f"{inside}.norm",
    )
    model = build_on_meta(descriptor.model_class, config, torch.float32)
    assert len(model.get_submodule(descriptor.layers)) == 4
    assert model.get_submodule(str(descriptor.head)).out_features == 128


def test_architectures_decide_between_the_classes_of_a_config() -> None:
    config = family_config("llama4")
    config.architectures = ["Llama4ForCausalLM"]
    assert model_class_of(config).__name__ == "Llama4ForCausalLM"
    config.architectures = ["Llama4ForConditionalGeneration"]
    assert model_class_of(config).__name__ == "Llama4ForConditionalGeneration"


def test_families_without_a_causal_language_model_are_refused_clearly() -> None:
    with pytest.raises(FamilyError, match="no causal language model for CLIPVisionConfig"):
        ModelDescriptor.from_config(CONFIG_MAPPING["clip_vision_model"]())


def test_missing_layer_list_is_refused_clearly() -> None:
    config: PreTrainedConfig = tiny_config("llama", layers=2)
    model = build_on_meta(ModelDescriptor.from_config(config).model_class, config, torch.float32)
    model.model.layers = nn.ModuleList(list(model.model.layers) * 2)
    with pytest.raises(FamilyError, match="has 0 lists of 2 decoder layers"):
        find_layers(model)
