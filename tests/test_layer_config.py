"""A layer's config reads through to the model's."""

from __future__ import annotations

import copy
import pickle

import pytest
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

from patchers.layer_config import base_config, layer_config


@pytest.fixture(params=[LlamaConfig, Qwen3Config])
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return request.param(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=3)


def test_overrides_win_and_the_rest_reads_through(config: PreTrainedConfig) -> None:
    view = layer_config(config, {"intermediate_size": 32})
    assert (view.intermediate_size, view.hidden_size, config.intermediate_size) == (32, 64, 96)
    config.attention_bias = True
    assert view.attention_bias is True


def test_attention_implementation_never_goes_stale(config: PreTrainedConfig) -> None:
    view = layer_config(config, {"intermediate_size": 32})
    for name in ("eager", "sdpa"):
        config._attn_implementation = name
        assert view._attn_implementation == name


def test_writes_go_to_the_model_except_for_overrides(config: PreTrainedConfig) -> None:
    view = layer_config(config, {"intermediate_size": 32})
    view.rms_norm_eps = 0.5
    view.intermediate_size = 16
    assert (config.rms_norm_eps, config.intermediate_size, view.intermediate_size) == (0.5, 96, 16)


def test_properties_and_methods_follow_the_overrides(config: PreTrainedConfig) -> None:
    view = layer_config(config, {"intermediate_size": 32})
    assert view.to_dict() == {**config.to_dict(), "intermediate_size": 32}
    assert view.get_text_config() is view


def test_aliases_of_a_field_are_overridden_too() -> None:
    config = GPT2Config(n_embd=32, n_head=4, n_inner=64)
    view = layer_config(config, {"num_attention_heads": 2})
    assert (view.n_head, view.num_attention_heads, config.n_head) == (2, 2, 4)


def test_is_an_instance_of_the_config_class(config: PreTrainedConfig) -> None:
    view = layer_config(config, {})
    assert isinstance(view, type(config))
    assert type(layer_config(config, {})) is type(view)
    assert base_config(view) is config
    assert base_config(config) is config


def test_copies_and_pickles_with_the_config_that_it_reads(config: PreTrainedConfig) -> None:
    pair = (config, layer_config(config, {"intermediate_size": 32}))
    for twin, view in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert base_config(view) is twin
        assert view.intermediate_size == 32
        twin.rms_norm_eps = 0.25
        assert view.rms_norm_eps == 0.25
        assert config.rms_norm_eps != 0.25


def test_unknown_attributes_raise(config: PreTrainedConfig) -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer_config(config, {}).no_such_thing


def test_cannot_be_made_by_its_class(config: PreTrainedConfig) -> None:
    with pytest.raises(TypeError, match="layer_config"):
        type(layer_config(config, {}))()
