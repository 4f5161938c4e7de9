"""What stands in for a removed or unowned part keeps the books right."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from patchers.errors import PartialModelError
from patchers.substitutes import (
    LinearAttention,
    LinearFFN,
    NoAttention,
    NoFFN,
    Unowned,
    UnownedBlock,
    UnownedEmbedding,
    armed,
)

HIDDEN = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("by_keyword", [False, True])
def test_removed_attention_adds_nothing_and_counts_tokens(by_keyword: bool) -> None:
    attention, cache = NoAttention(layer_idx=1, arity=2), DynamicCache()
    for step in (1, 2):
        args, kwargs = ((), {"hidden_states": HIDDEN}) if by_keyword else ((HIDDEN,), {})
        output, weights = attention(*args, **kwargs, past_key_values=cache)
        assert weights is None
        assert torch.equal(output, torch.zeros_like(HIDDEN))
        assert cache.get_seq_length(1) == 3 * step


def test_placeholder_takes_two_numbers_a_token() -> None:
    cache = DynamicCache()
    NoAttention(0, 2)(HIDDEN, past_key_values=cache)
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (2, 1, 3, 1)


def test_linear_attention_is_its_weight_and_counts_tokens() -> None:
    attention, cache = LinearAttention(8, 0, 2), DynamicCache()
    assert list(attention.state_dict()) == ["linear_attn.weight"]
    output, _ = attention(hidden_states=HIDDEN, past_key_values=cache)
    assert torch.equal(output, HIDDEN @ attention.linear_attn.weight.T)
    assert cache.get_seq_length() == 3


def test_ffn_substitutes_return_what_the_family_returns() -> None:
    assert torch.equal(NoFFN(0)(HIDDEN), torch.zeros_like(HIDDEN))
    zeros, nothing = NoFFN(2)(HIDDEN)
    assert torch.equal(zeros, torch.zeros_like(HIDDEN))
    assert nothing is None
    linear = LinearFFN(8, 0)
    assert list(linear.state_dict()) == ["linear_mlp.weight"]
    assert torch.equal(linear(HIDDEN), HIDDEN @ linear.linear_mlp.weight.T)


def meta_layer() -> nn.Module:
    layer = nn.Linear(8, 8, device="meta")
    layer.attention_type = "full_attention"
    return layer


def test_stub_holds_no_storage_and_answers_for_its_original() -> None:
    stub = UnownedBlock(meta_layer(), "model.layers.3", layer_idx=3, arity=0)
    assert list(stub.parameters()) == []
    assert dict(stub.state_dict()) == {}
    assert list(stub.children()) == []
    assert stub.attention_type == "full_attention"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = stub.no_such_thing


def test_stub_raises_until_it_is_armed() -> None:
    model = nn.Sequential(UnownedBlock(meta_layer(), "model.layers.3", layer_idx=3, arity=0))
    with pytest.raises(PartialModelError, match=r"does not own model\.layers\.3.*load the whole model"):
        model(HIDDEN)
    with armed(model):
        assert model(HIDDEN) is HIDDEN
    with pytest.raises(PartialModelError):
        model(HIDDEN)


def test_armed_stub_counts_tokens_and_keeps_the_return_form() -> None:
    stub, cache = UnownedBlock(meta_layer(), "h.2", layer_idx=2, arity=2), DynamicCache()
    with armed(stub):
        output, rest = stub(HIDDEN, past_key_values=cache)
    assert output is HIDDEN
    assert rest is None
    assert cache.get_seq_length(2) == 3


def test_arming_ends_with_an_exception_too() -> None:
    stub = Unowned(meta_layer(), "model.norm")
    with pytest.raises(KeyError), armed(stub):
        raise KeyError
    assert not stub.armed


def test_armed_embedding_gives_zeros_in_its_own_dtype() -> None:
    embedding = nn.Embedding(16, 8, device="meta", dtype=torch.bfloat16)
    stub = UnownedEmbedding(embedding, "model.embed_tokens")
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(PartialModelError, match=r"model\.embed_tokens"):
        stub(ids)
    with armed(stub):
        output = stub(ids)
    assert output.shape == (2, 3, 8)
    assert output.dtype is torch.bfloat16


def test_stub_copies_and_pickles() -> None:
    stub = UnownedBlock(meta_layer(), "model.layers.3", layer_idx=3, arity=0)
    for twin in (copy.deepcopy(stub), pickle.loads(pickle.dumps(stub))):
        assert twin.attention_type == "full_attention"
        assert twin.layer_idx == 3
        assert list(twin.parameters()) == []
