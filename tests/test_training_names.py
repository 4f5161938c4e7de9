"""Every public name of the two specifications is there, with the parameters that they give it."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint.stateful as torch_stateful
from torch import nn

import sharded_ckpt.training as training
from sharded_ckpt.training import stateful_wrappers

STATEFUL_WRAPPERS: dict[str, list[str]] = {
    "ModelState": ["model", "is_peft", "is_init_step", "skip_task_head_prefixes"],
    "ModelState._get_base_model_state_dict": ["self"],
    "ModelState._refresh_local_tied_lm_head": ["self"],
    "ModelState._set_base_model_state_dict": ["self", "state_dict"],
    "ModelState.load_state_dict": ["self", "state_dict", "strict"],
    "ModelState.state_dict": ["self"],
    "OptimizerState": ["model", "optimizer", "scheduler", "is_peft"],
    "OptimizerState.load_state_dict": ["self", "state_dict"],
    "OptimizerState.state_dict": ["self"],
    "_add_outer_prefix": ["sd", "prefix", "skip_keys"],
    "_drop_outer_prefix": ["sd", "prefix"],
    "_get_lm_head_weight_and_name": ["model"],
    "_get_peft_state_dict": ["model"],
    "_has_expert_parallelism": ["model"],
    "_has_quantized_params": ["model"],
    "_is_quantized_module": ["module"],
    "_rename_dora_keys_from_hf": ["sd"],
    "_rename_dora_keys_to_hf": ["sd"],
    "_set_peft_state_dict": ["model", "state_dict"],
    "has_local_tied_lm_head": ["model"],
    "is_tied_word_embeddings": ["model"],
}

TRANSFORMS: dict[str, list[str]] = {
    "StateDictTransforms.apply_dtype_convert": ["self", "state_dict"],
    "StateDictTransforms.apply_to_hf": ["self", "state_dict"],
    "StateDictTransforms.apply_from_hf": ["self", "state_dict"],
    "StateDictConverter.key_filter": ["self", "fqn"],
    "StateDictConverter.state_dict_transform": ["self", "state_dict"],
    "StateDictConverter.state_dict_adapter": ["self"],
    "BaseStateDictAdapter.to_hf": ["self", "state_dict"],
    "BaseStateDictAdapter.from_hf": ["self", "hf_state_dict"],
    "ModelWrapper.state_dict": ["self", "mode"],
    "ModelWrapper.load_state_dict": ["self", "state_dict", "strict"],
}


def found_in(module: Any, name: str) -> Any:
    found = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [(stateful_wrappers, name, said) for name, said in STATEFUL_WRAPPERS.items()]
    + [(training, name, said) for name, said in TRANSFORMS.items()],
    ids=[*STATEFUL_WRAPPERS, *TRANSFORMS],
)
def test_specified_parameters_come_first_and_extras_by_keyword(module, name, parameters):
    found = list(inspect.signature(found_in(module, name)).parameters.values())
    assert [p.name for p in found[: len(parameters)]] == parameters
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in found[len(parameters) :])


def test_the_wrapper_takes_its_hooks_by_keyword_and_full_is_its_default_mode():
    parameters = inspect.signature(training.ModelWrapper).parameters
    assert {"key_filter", "state_dict_transform"} < {
        n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY
    }
    assert inspect.signature(training.ModelWrapper.state_dict).parameters["mode"].default == "full"
    assert stateful_wrappers._PREFIX == "model."


def test_attributes_of_the_specification_are_there():
    state = training.ModelState(nn.Linear(2, 2))
    names = ["model", "is_peft", "is_init_step", "skip_task_head_prefixes", "uses_tied_lm_head"]
    assert all(hasattr(state, name) for name in [*names, "has_local_tied_lm_head", "lm_head_param_name"])
    optimizers = training.OptimizerState(nn.Linear(2, 2), None)
    assert all(hasattr(optimizers, name) for name in ("model", "optimizer", "scheduler"))
    transforms = training.StateDictTransforms()
    names = ["sd_adapter", "export_dtype", "fqn_to_index_mapping", "hf_assets_path", "key_filter"]
    assert all(hasattr(transforms, name) for name in names)


def test_torch_takes_them_for_stateful():
    model = nn.Linear(2, 2)
    for state in (
        training.ModelState(model),
        training.OptimizerState(model, None),
        training.ModelWrapper(model),
    ):
        assert isinstance(state, torch_stateful.Stateful)


def test_every_public_name_is_documented_and_seen_by_type_checkers():
    assert all(inspect.getdoc(getattr(training, name)) for name in training.__all__)
    source = Path(importlib.import_module("sharded_ckpt.training").__file__ or "").read_text()
    block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    seen = [alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(filter(None, seen)) == training.__all__
