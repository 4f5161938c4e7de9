"""Adapters: peft opens ours, ours opens peft's, and an export with merged adapters is the arithmetic said."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.gloo import RankFailure
from support.tiny import tiny_checkpoint, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from patchers.errors import CheckpointError, ConfigError, MissingKeysError
from sharded_ckpt.loading.verbs import load_and_shard_model
from sharded_ckpt.training import (
    MergedAdapters,
    ModelState,
    ModelWrapper,
    OptimizerState,
    StateDictTransforms,
    export_checkpoint,
    load_adapter,
    load_training_state,
    save_adapter,
    save_training_state,
)
from sharded_ckpt.training.stateful_wrappers import _get_peft_state_dict, _set_peft_state_dict

IDS = torch.arange(1, 9).reshape(2, 4)
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora with biases": {"use_rslora": True, "bias": "lora_only"},
    "with whole modules": {"modules_to_save": ["lm_head"]},
}


def with_adapter(base: Any, config: peft.LoraConfig) -> Any:
    """What peft makes of a model; it asks transformers for something by a name that is going away."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return peft.get_peft_model(base, config)


def opened_by_peft(base: Any, folder: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return peft.PeftModel.from_pretrained(base, folder).eval()


def adapted(base: Any, seed: int = 1, **options: Any) -> Any:
    """A model with an adapter whose every tensor says something."""
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"], **options)
    model = with_adapter(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def base_model() -> Any:
    return tiny_model("qwen2", layers=2)  # it has biases


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_opens_what_is_saved_here_and_the_other_way_round(tmp_path, kind):
    model = adapted(base_model(), **CONFIGS[kind])
    save_adapter(tmp_path / "ours", model, durable=False)
    model.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    opened = opened_by_peft(base_model(), tmp_path / "ours")
    assert torch.equal(logits(opened), logits(model))
    for saved in ("ours", "peft"):
        other = adapted(base_model(), seed=2, **CONFIGS[kind])
        assert not torch.equal(logits(other), logits(model))
        assert load_adapter(tmp_path / saved, other)
        assert torch.equal(logits(other), logits(model))
    keys = ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "bias", "modules_to_save")
    said = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft")]
    assert [said[0][key] for key in keys] == [said[1][key] for key in keys]
    assert sorted(said[0]["target_modules"]) == sorted(said[1]["target_modules"])


def test_what_is_trained_besides_is_kept(tmp_path):
    model = adapted(base_model())
    norm = model.base_model.model.model.norm.weight
    norm.requires_grad_(True)
    state = ModelState(model, is_peft=True)
    assert "base_model.model.model.norm.weight" in state.state_dict()
    saved = {name: tensor + 1 for name, tensor in state.state_dict().items()}
    state.load_state_dict(saved)
    assert torch.equal(norm, saved["base_model.model.model.norm.weight"])


def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path):
    save_adapter(tmp_path, adapted(base_model()), durable=False)
    small = with_adapter(base_model(), peft.LoraConfig(r=1, target_modules=["q_proj", "up_proj"]))
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(CheckpointError, match=r"lora_A\.weight has shape \(2, 64\) in the checkpoint"):
        load_adapter(tmp_path, small)
    more = with_adapter(base_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "v_proj"]))
    with pytest.raises(
        MissingKeysError, match=r"the checkpoint lacks: base_model\.model\.model\.layers\.\{0-1\}"
    ):
        load_adapter(tmp_path, more)
    less = with_adapter(base_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match=r"no rank wants: base_model.*up_proj\.lora_A\.weight"):
        load_adapter(tmp_path, less)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


# Base weights, exports -------------------------------------------------------------------------------------


def test_base_weights_have_the_base_models_names_and_fill_it(tmp_path):
    model = adapted(base_model(), modules_to_save=["lm_head"])
    state = ModelState(model, is_peft=True, is_init_step=True)
    base = tiny_model("qwen2", layers=2, seed=5)
    assert set(state.state_dict()) == set(base.state_dict())
    report = state.load_state_dict(base.state_dict())
    assert report
    assert torch.equal(model.base_model.model.lm_head.original_module.weight, base.lm_head.weight)
    assert not torch.equal(model.base_model.model.lm_head.modules_to_save.default.weight, base.lm_head.weight)


def test_an_export_has_w_plus_b_a_scale_exactly_and_the_live_model_stays(tmp_path):
    model = adapted(base_model())
    before = copy.deepcopy(model.state_dict())
    expected = logits(copy.deepcopy(model).merge_and_unload())
    transforms = StateDictTransforms(converters=[MergedAdapters(model)])
    export_checkpoint(tmp_path, model, transforms=transforms, durable=False)
    exported = load_file(tmp_path / "model-00001-of-00001.safetensors")
    for i in range(2):
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        a, b = (before[f"{name}.lora_{part}.default.weight"] for part in "AB")
        merged = before[f"{name}.base_layer.weight"] + b @ a * (8 / 2)
        assert torch.equal(exported[f"model.layers.{i}.self_attn.q_proj.weight"], merged)
    assert set(exported) == set(base_model().state_dict())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(opened), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["dora", "with whole modules"])
def test_exports_of_other_adapters_are_what_peft_merges(tmp_path, kind):
    model = adapted(base_model(), **CONFIGS[kind])
    wrapper = ModelWrapper(model, transforms=StateDictTransforms(converters=[MergedAdapters(model)]))
    exported = wrapper.state_dict("export")
    assert set(wrapper.state_dict("adapter")) <= set(model.state_dict()) - set(wrapper.state_dict("base"))
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True).state_dict()
    assert exported.keys() == merged.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in exported.items())


# Models that peft did not make -----------------------------------------------------------------------------


class DoRALinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.lora_magnitude = nn.Parameter(torch.ones(2))


def test_of_other_models_the_adapter_is_what_is_trained_under_pefts_names():
    model = nn.ModuleDict({"q": DoRALinear()})
    state = ModelState(model, is_peft=True)
    assert list(state.state_dict()) == ["base_model.model.q.lora_magnitude_vector"]
    assert list(_get_peft_state_dict(model)) == ["q.lora_magnitude"]
    given = {"base_model.model.q.lora_magnitude_vector": torch.full((2,), 3.0)}
    state.load_state_dict(given)
    assert model["q"].lora_magnitude.eq(3).all()
    assert list(given) == ["base_model.model.q.lora_magnitude_vector"]
    assert _set_peft_state_dict(model, {"q.lora_magnitude": torch.ones(2), "q.weight": torch.ones(2, 2)}) == [
        "q.weight"
    ]
    assert model["q"].lora_magnitude.eq(1).all()
    assert model["q"].weight.eq(0).all()
    with pytest.raises(
        MissingKeysError, match=r"no trained parameter of the ModuleDict has one of these names: w"
    ):
        _set_peft_state_dict(model, {"w": torch.ones(1)})


def test_such_an_adapter_needs_a_config_to_be_saved(tmp_path):
    model = nn.ModuleDict({"q": DoRALinear()})
    with pytest.raises(ConfigError, match=r"no rank has a model made by peft.*pass config="):
        save_adapter(tmp_path / "a", model)
    save_adapter(tmp_path / "a", model, config={"peft_type": "LORA"}, durable=False)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == {"peft_type": "LORA"}


# Ranks -----------------------------------------------------------------------------------------------------


def adapt_on_ranks(parent: str, out: str, blocks: list[list[int]]) -> Any:
    """Adapt the shards (a rank without blocks has no adapter), save, load into others, export merged."""
    shard = load_and_shard_model("auto", parent, blocks[dist.get_rank()])
    owned = blocks[dist.get_rank()]
    for parameter in shard.parameters():
        parameter.requires_grad_(False)
    model = adapted(shard, seed=dist.get_rank()) if owned else shard
    save_adapter(f"{out}/adapter", model, durable=False)
    again = load_and_shard_model("auto", parent, owned)
    for parameter in again.parameters():
        parameter.requires_grad_(False)
    other = adapted(again, seed=9) if owned else again
    load_adapter(f"{out}/adapter", other)
    first, second = (ModelState(m, is_peft=True).state_dict() for m in (model, other))
    same = all(torch.equal(second[name], tensor) for name, tensor in first.items())
    transforms = StateDictTransforms(converters=[MergedAdapters(model)])
    export_checkpoint(f"{out}/merged", model, transforms=transforms, durable=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained) if trained else None
    state = OptimizerState(model, optimizer) if optimizer else None
    save_training_state(f"{out}/state", ModelState(model, is_peft=True), state, durable=False)
    load_training_state(f"{out}/state", ModelState(other, is_peft=True))
    return same, len(first)


def test_adapters_of_shards_are_one_adapter_and_a_rank_may_have_none(gloo, tmp_path):
    parent = tiny_checkpoint(
        tmp_path / "parent" if (tmp_path / "parent").mkdir() is None else tmp_path, "qwen2"
    )
    results = gloo.run_ok(adapt_on_ranks, str(parent), str(tmp_path), [[0, 3], [], [1, 2]], world_size=3)
    assert [same for same, _ in results] == [True] * 3
    assert results[1][1] == 0
    whole = opened_by_peft(AutoModelForCausalLM.from_pretrained(parent), tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(whole.merge_and_unload()))
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(parent)))


def save_unlike_adapters(out: str) -> None:
    config = peft.LoraConfig(r=2 + dist.get_rank(), target_modules=["q_proj"])
    save_adapter(out, with_adapter(tiny_model(layers=1), config))


def test_adapters_of_different_configs_are_refused_on_all_ranks(gloo, tmp_path):
    results = gloo.run(save_unlike_adapters, str(tmp_path / "a"))
    assert all(isinstance(result, RankFailure) for result in results)
    assert {result.text for result in results} == {results[0].text}
    assert "the adapters of the ranks have different r" in results[0].text
    assert not (tmp_path / "a").exists()
