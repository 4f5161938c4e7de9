"""A model as state: names, tied heads, parts, base weights, and loads that fill everything or nothing."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.tiny import tiny_model
from torch import nn

from patchers.errors import CheckpointError, ConfigError, MissingKeysError
from sharded_ckpt.model import create_local_shard_
from sharded_ckpt.training import ModelState
from sharded_ckpt.training.key_names import (
    _add_outer_prefix,
    _drop_outer_prefix,
    _rename_dora_keys_from_hf,
    _rename_dora_keys_to_hf,
)
from sharded_ckpt.training.module_kinds import (
    _has_expert_parallelism,
    _has_quantized_params,
    _is_quantized_module,
)
from sharded_ckpt.training.tied_head import (
    _get_lm_head_weight_and_name,
    has_local_tied_lm_head,
    is_tied_word_embeddings,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() for name, value in state.items()}


def shards_of(model: Any, *owned: set[int]) -> list[Any]:
    return [create_local_shard_(copy.deepcopy(model), blocks, "auto") for blocks in owned]


# Prefixes and names ----------------------------------------------------------------------------------------


def test_a_prefix_is_removed_once_from_those_that_have_it_and_put_back():
    state = {"model.model.norm": 1, "lm_head": 2}
    _drop_outer_prefix(state)
    assert state == {"model.norm": 1, "lm_head": 2}
    _add_outer_prefix(state, "model.", ["lm_head", "model.norm"])
    assert state == {"model.norm": 1, "lm_head": 2}
    _add_outer_prefix(state, "outer.")
    assert state == {"outer.model.norm": 1, "outer.lm_head": 2}


def test_a_prefix_whose_removal_would_overwrite_a_tensor_is_refused_and_nothing_is_changed():
    state = {"model.norm": 1, "norm": 2}
    with pytest.raises(CheckpointError, match=r"several tensors would be called norm: nothing was renamed"):
        _drop_outer_prefix(state)
    assert state == {"model.norm": 1, "norm": 2}


def test_dora_magnitudes_are_renamed_both_ways_and_from_the_form_once_written():
    state = {"q.lora_magnitude": 1, "q.lora_A.weight": 2}
    _rename_dora_keys_to_hf(state)
    assert state == {"q.lora_magnitude_vector": 1, "q.lora_A.weight": 2}
    _rename_dora_keys_from_hf(state)
    assert state == {"q.lora_magnitude": 1, "q.lora_A.weight": 2}
    old = {"q.lora_magnitude_vector.default.weight": 1}
    _rename_dora_keys_from_hf(old)
    assert old == {"q.lora_magnitude": 1}


def test_names_are_those_of_the_model_without_what_wrappers_put_into_them():
    model = tiny_model(layers=1)
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    assert list(ModelState(wrapped).state_dict()) == list(model.state_dict())
    assert _get_lm_head_weight_and_name(wrapped)[1] == HEAD


class OtherHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2, 2)

    def get_output_embeddings(self) -> nn.Module:
        return self.out


def test_the_head_is_found_by_the_model_or_by_its_name_and_may_be_missing():
    assert _get_lm_head_weight_and_name(OtherHead())[1] == "out.weight"
    outer = nn.Module()
    outer.add_module("a", nn.ModuleDict({"lm_head": nn.Linear(2, 3)}))
    weight, name = _get_lm_head_weight_and_name(outer)
    assert name == "a.lm_head.weight"
    assert weight is not None
    assert weight.shape == (3, 2)
    assert _get_lm_head_weight_and_name(nn.Linear(2, 2)) == (None, None)


def test_whether_the_config_ties_is_asked_of_the_outer_the_thinker_and_the_text_config():
    def model(**config: Any) -> nn.Module:
        module = nn.Linear(1, 1)
        module.config = SimpleNamespace(**config)  # type: ignore[assignment]
        return module

    text = SimpleNamespace(tie_word_embeddings=True)
    assert is_tied_word_embeddings(model(tie_word_embeddings=True))
    assert not is_tied_word_embeddings(model(tie_word_embeddings=False, get_text_config=lambda: text))
    assert is_tied_word_embeddings(model(thinker_config=text))
    assert is_tied_word_embeddings(model(get_text_config=lambda: text))
    assert not is_tied_word_embeddings(nn.Linear(1, 1))


# Tied heads ------------------------------------------------------------------------------------------------


def test_a_head_that_is_the_embedding_is_left_out_and_filled_from_it():
    model = tiny_model("qwen3", layers=1, tied=True)
    state = ModelState(model)
    assert state.uses_tied_lm_head
    assert state.has_local_tied_lm_head
    saved = copied(state.state_dict())
    assert HEAD not in saved
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert state.load_state_dict(saved)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, saved[EMBEDDING])


def test_a_head_that_only_the_config_calls_tied_is_kept():
    model = tiny_model("qwen3", layers=1, tied=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    state = ModelState(model)
    assert state.uses_tied_lm_head
    assert not state.has_local_tied_lm_head
    assert torch.equal(state.state_dict()[HEAD], model.lm_head.weight)


def test_tying_that_happens_later_is_seen():
    model = tiny_model("qwen3", layers=1, tied=True)
    tied, model.lm_head.weight = model.lm_head.weight, nn.Parameter(model.lm_head.weight.detach().clone())
    state = ModelState(model)
    assert HEAD in state.state_dict()
    model.lm_head.weight = tied
    assert HEAD not in state.state_dict()
    assert state.has_local_tied_lm_head


def test_the_last_stage_of_a_tied_model_keeps_its_head_and_fills_it_from_the_embedding():
    model = tiny_model("qwen3", layers=2, tied=True)
    first, last = shards_of(model, {0}, {1})
    assert HEAD in ModelState(last).state_dict()
    assert not has_local_tied_lm_head(first)
    assert not has_local_tied_lm_head(last)
    saved = copied(ModelState(model).state_dict())
    saved[EMBEDDING] += 1
    assert ModelState(last).load_state_dict(saved).missing == ()
    assert torch.equal(last.lm_head.weight, saved[EMBEDDING])


def test_a_head_apart_is_tied_again_by_a_state_dict_without_one_and_takes_the_files_values():
    model = tiny_model("qwen3", layers=1, tied=True)
    saved = copied(ModelState(model).state_dict())
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(5)
    ModelState(model).load_state_dict(saved)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, saved[EMBEDDING])


def test_an_untied_model_is_never_tied():
    model = tiny_model(layers=1)
    saved = copied(ModelState(model).state_dict())
    head = saved.pop(HEAD)
    with pytest.raises(MissingKeysError, match=r"the checkpoint lacks: lm_head\.weight"):
        ModelState(model).load_state_dict(saved)
    ModelState(model).load_state_dict(saved, strict=False)
    assert torch.equal(model.lm_head.weight, head)


def test_two_values_for_one_tied_tensor_are_refused():
    model = tiny_model("qwen3", layers=1, tied=True)
    saved = copied(ModelState(model).state_dict())
    saved[HEAD] = saved[EMBEDDING].clone()
    assert ModelState(model).load_state_dict(saved)
    saved[HEAD] += 1
    with pytest.raises(CheckpointError, match=r"are one tensor in this model, and hold different values"):
        ModelState(model).load_state_dict(saved)


# Loads -----------------------------------------------------------------------------------------------------


def test_a_load_that_does_not_fit_changes_nothing():
    model = tiny_model(layers=2)
    before, saved = copied(model.state_dict()), copied(ModelState(model).state_dict())
    for tensor in saved.values():
        tensor += 1
    wrong = "model.layers.1.mlp.up_proj.weight"
    saved[wrong] = saved[wrong][:-2]
    with pytest.raises(
        CheckpointError, match=rf"{wrong} has shape \(94, 64\) in the checkpoint, the model wants"
    ):
        ModelState(model).load_state_dict(saved, strict=False)
    saved[wrong] = torch.zeros(96, 64, dtype=torch.float8_e4m3fn)
    with pytest.raises(
        CheckpointError, match=r"F8_E4M3 in the checkpoint and F32 in the model, which is not cast"
    ):
        ModelState(model).load_state_dict(saved)
    del saved[wrong]
    with pytest.raises(MissingKeysError, match=r"lacks: model\.layers\.1\.mlp\.up_proj\.weight"):
        ModelState(model).load_state_dict(saved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_casts_and_leftovers_are_reported_and_the_callers_dict_stays_as_it_is():
    model = tiny_model(layers=1)
    saved = {name: tensor.bfloat16() for name, tensor in ModelState(model).state_dict().items()}
    saved["more"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"the checkpoint has, and no rank wants: more"):
        ModelState(model).load_state_dict(saved)
    names = list(saved)
    report = ModelState(model).load_state_dict(saved, strict=False)
    assert list(saved) == names
    assert report.unexpected == ("more",)
    assert report.filled == len(names) - 1
    assert not report
    assert set(report.cast) == {"BF16 -> F32"}
    assert len(report.cast["BF16 -> F32"]) == report.filled
    assert "wanted by no rank: more" in str(report)
    assert "cast BF16 -> F32" in str(report)


def test_names_of_another_form_of_the_model_are_an_error_even_without_strictness():
    model = tiny_model(layers=1)
    saved = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"none of its 12 tensors is one of the model"):
        ModelState(model).load_state_dict(saved, strict=False)


def test_blocks_that_other_ranks_own_are_no_surprise_to_a_shard():
    model = tiny_model(layers=3)
    (shard,) = shards_of(model, {1})
    saved = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    assert ModelState(shard).load_state_dict(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in shard.state_dict().items())


def test_parts_are_one_state_and_must_not_number_their_blocks_alike():
    model = tiny_model(layers=4)
    parts = shards_of(model, {0, 2}, {1, 3})
    state = ModelState(parts).state_dict()
    assert set(state) == set(model.state_dict())
    assert ModelState(parts).load_state_dict({name: t * 2 for name, t in model.state_dict().items()})
    assert torch.equal(
        parts[1].model.layers[3].mlp.up_proj.weight, 2 * model.model.layers[3].mlp.up_proj.weight
    )
    with pytest.raises(CheckpointError, match=r"two parts of the model have different tensors called weight"):
        ModelState([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(ConfigError, match=r"expected a module or a list of modules, found an empty list"):
        ModelState([])


def test_what_is_on_meta_becomes_real():
    model = tiny_model("qwen3", layers=1, tied=True)
    saved = copied(ModelState(model).state_dict())
    with torch.device("meta"):
        empty = type(model)(model.config)
    ModelState(empty).load_state_dict(saved)
    found = dict(empty.named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


# Base weights ----------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.classifier = nn.Linear(2, 2), nn.Linear(2, 3)


def test_task_heads_are_left_out_of_base_weights_and_keep_their_values():
    model = Classifier()
    kept = model.classifier.weight.detach().clone()
    state = ModelState(model, is_init_step=True, skip_task_head_prefixes=["classifier."])
    assert list(state.state_dict()) == ["model.weight", "model.bias"]
    base = {"model.weight": torch.ones(2, 2), "model.bias": torch.ones(2), "classifier.weight": torch.ones(9)}
    report = state.load_state_dict(base)
    assert report.skipped == ("classifier.weight",)
    assert report.filled == 2
    assert torch.equal(model.classifier.weight, kept)
    assert model.model.weight.eq(1).all()
    assert "classifier.weight" in ModelState(model, skip_task_head_prefixes=["classifier."]).state_dict()


def test_missing_base_weights_are_told():
    report = ModelState(Classifier(), is_init_step=True).load_state_dict({"model.bias": torch.zeros(2)})
    assert report.missing == ("model.weight", "classifier.weight", "classifier.bias")


# Odd modules -----------------------------------------------------------------------------------------------


class WithExtraState(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2, bias=False)
        self.told: Any = torch.tensor([1.0])

    def get_extra_state(self) -> Any:
        return self.told

    def set_extra_state(self, state: Any) -> None:
        self.told = state


def test_extra_states_alone_may_be_missing_and_are_handed_back():
    model = nn.Sequential(WithExtraState())
    saved = ModelState(model).state_dict()
    assert set(saved) == {"0.weight", "0._extra_state"}
    extra = saved.pop("0._extra_state")
    assert ModelState(model).load_state_dict(saved)
    model[0].told = None
    ModelState(model).load_state_dict({**saved, "0._extra_state": extra, "9._extra_state": object()})
    assert model[0].told is extra


def test_quantised_modules_and_experts_over_ranks_are_recognised_by_what_they_say():
    plain, four_bit, eight_bit = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    four_bit.quant_state = object()  # type: ignore[assignment]
    eight_bit.weight.__class__ = type("Int8Params", (nn.Parameter,), {})
    assert [_is_quantized_module(module) for module in (plain, four_bit, eight_bit)] == [False, True, True]
    assert _has_quantized_params(nn.Sequential(plain, four_bit))
    with pytest.raises(ConfigError, match=r"quantised by bitsandbytes.*is_peft=True"):
        ModelState(nn.Sequential(plain, four_bit)).load_state_dict({"0.bias": torch.zeros(1)})
    experts = nn.Linear(1, 1)
    experts.ep_size = 1  # type: ignore[assignment]
    assert not _has_expert_parallelism(nn.Sequential(plain, experts))
    experts.ep_size = 2  # type: ignore[assignment]
    assert _has_expert_parallelism(nn.Sequential(plain, experts))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_torchs_own_checkpoints_take_and_fill_it(tmp_path):
    model = tiny_model("qwen3", layers=1, tied=True)
    expected = copied(model.state_dict())
    dcp.save({"model": ModelState(model)}, checkpoint_id=tmp_path, no_dist=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    dcp.load({"model": ModelState(model)}, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_the_state_shares_memory_with_the_model_unless_it_is_moved_and_is_current():
    model = nn.Linear(2, 2)
    state = ModelState(model, cpu_offload=True)
    first = ModelState(model).state_dict()
    with torch.no_grad():
        model.weight.fill_(3)
    assert first["weight"].eq(3).all()
    assert state.state_dict()["weight"].eq(3).all()
    assert not first["weight"].requires_grad
