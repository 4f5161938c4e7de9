"""What is public, and that it costs nothing until it is used."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import patchers
import sharded_ckpt

PATCHERS = """AttentionConfig BlockConfig Dialect FFNConfig LayerKind MambaConfig ModelDescriptor MoEConfig
SubBlock capabilities deci_x_patcher infer_block_configs parse_blocks read_block_configs register_descriptor
write_block_configs"""
SHARDED_CKPT = """BlockConfigError CheckpointError CheckpointNotFoundError CollectiveError ConfigError
FamilyError LoadReport MissingKeysError OwnershipError OwnershipPlan PartialModelError PatchError
PipelineStage Runtime
ShardedCkptError create_local_shard_ create_sharded_model default_runtime init_child_from_parent
is_in_safetensors_format load_and_shard_model load_model_config load_sharded_state_dict
load_state_dict_to_shards plan_ownership run_on_ranks
save_sharded_checkpoint save_sharded_model set_submodule"""

SIGNATURES = {
    "create_local_shard_": ["model", "owned_block_indexes", "descriptor", "runtime"],
    "create_sharded_model": [
        "runtime",
        "descriptor",
        "model_config",
        "owned_block_indexes",
        "device",
        "dtype",
    ],
    "is_in_safetensors_format": ["checkpoint_dir"],
    "load_and_shard_model": ["descriptor", "checkpoint_path", "owned_block_indexes", "model_config"],
    "load_sharded_state_dict": ["model_name_or_path", "keys_to_load", "device"],
    "load_state_dict_to_shards": ["model_shard", "loaded_state_dict"],
    "save_sharded_model": ["model_shard", "out_path"],
    "set_submodule": ["model", "module_name", "new_submodule"],
}


@pytest.mark.parametrize(("package", "names"), [(patchers, PATCHERS), (sharded_ckpt, SHARDED_CKPT)])
def test_public_names_are_these(package: object, names: str) -> None:
    assert package.__all__ == sorted(names.split())
    assert dir(package) == package.__all__
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


@pytest.mark.parametrize("package", ["patchers", "sharded_ckpt"])
def test_type_checkers_see_the_same_names(package: str) -> None:
    source = Path(importlib.import_module(package).__file__ or "").read_text()
    block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    seen = [alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(seen) == importlib.import_module(package).__all__


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_specified_parameters_come_first_and_extras_by_keyword(name: str) -> None:
    parameters = list(inspect.signature(getattr(sharded_ckpt, name)).parameters.values())
    specified, extras = parameters[: len(SIGNATURES[name])], parameters[len(SIGNATURES[name]) :]
    assert [p.name for p in specified] == SIGNATURES[name]
    assert {p.kind for p in specified} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in extras)


def test_patcher_signature_is_the_specified_one() -> None:
    parameters = inspect.signature(patchers.deci_x_patcher).parameters
    assert list(parameters) == ["model_descriptor", "block_configs"]
    assert parameters["block_configs"].default is None


def test_public_functions_and_classes_are_documented() -> None:
    for package in (patchers, sharded_ckpt):
        for name in package.__all__:
            assert inspect.getdoc(getattr(package, name)), name
