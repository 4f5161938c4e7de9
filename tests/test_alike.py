"""Blocks that are all alike are built when they are owned, and are then what their own class builds."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import FAMILIES, tiny_checkpoint, tiny_config
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from patchers.alike import AlikeBlocks
from patchers.descriptor import ModelDescriptor, plain_class_of, register_descriptor
from patchers.errors import FamilyError
from patchers.meta import build_on_meta
from patchers.substitutes import Unowned
from sharded_ckpt import load_and_shard_model
from sharded_ckpt.model import build_skeleton

SIMPLE = (int, float, str, bool, type(None))


def built(family: str, *owned: int, **config: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model whose blocks are built only if owned, and one that its own class has built."""
    tiny = tiny_config(family, dtype=torch.bfloat16, **config)
    model_class = plain_class_of(tiny)
    assert model_class is not None
    alike = AlikeBlocks()
    with alike.unbuilt(model_class):
        model = build_on_meta(model_class, tiny, tiny.dtype)
    for index in owned:
        alike.build(model.model.layers[index])
    return model, build_on_meta(model_class, tiny, tiny.dtype)


def attributes(block: nn.Module) -> dict[str, dict[str, Any]]:
    """The plain attributes of each module in a block."""
    return {
        name: {key: value for key, value in vars(module).items() if isinstance(value, SIMPLE)}
        for name, module in block.named_modules()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_all_blocks_have_their_names_shapes_and_dtypes(family: str, tied: bool) -> None:
    model, native = (one.state_dict() for one in built(family, tied=tied))
    assert list(model) == list(native)
    assert [(t.shape, t.dtype, t.device) for t in model.values()] == [
        (t.shape, t.dtype, t.device) for t in native.values()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_that_is_owned_is_what_its_class_builds(family: str) -> None:
    model, native = built(family, 0, 3)
    for index in (0, 3):
        block, twin = model.model.layers[index], native.model.layers[index]
        assert str(block) == str(twin)
        assert attributes(block) == attributes(twin)
        assert block.self_attn.layer_idx == index
        assert block.self_attn.config is model.config
        assert {t.dtype for t in block.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_blocks_that_are_built_share_nothing_with_those_that_are_not() -> None:
    model, _ = built("llama", 0)
    first, *others = ({id(t) for t in block.parameters()} for block in model.model.layers)
    assert not first & set.union(*others)


def test_a_block_that_is_not_built_has_no_attributes_of_another_one() -> None:
    model, native = built("qwen2", 1)
    assert hasattr(native.model.layers[0], "hidden_size")
    assert [hasattr(block, "hidden_size") for block in model.model.layers] == [False, True, False, False]


def test_another_thread_builds_its_own_models_whole() -> None:
    config, go = tiny_config("llama"), threading.Event()
    model_class: Any = plain_class_of(config)
    found: list[nn.Module] = []

    def build() -> None:
        go.wait(10)
        found.extend(layer.self_attn for layer in build_on_meta(model_class, config, None).model.layers)

    thread = threading.Thread(target=build)
    thread.start()
    with AlikeBlocks().unbuilt(model_class):
        go.set()
        thread.join()
    assert len(set(found)) == 4


def test_a_descriptor_of_ones_own_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchers.descriptor._OWN", {})
    config = tiny_config("llama")
    assert plain_class_of(config) is not None
    register_descriptor("llama", lambda config: ModelDescriptor.from_config(config, LlamaForCausalLM))
    assert plain_class_of(config) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_describes_itself_as_its_family_is_described(family: str) -> None:
    config = tiny_config(family)
    descriptor = ModelDescriptor.from_family(family)
    model = build_skeleton(descriptor, config)
    assert ModelDescriptor.from_skeleton(model) == descriptor
    assert ModelDescriptor.from_skeleton(model).layer_kinds == descriptor.layer_kinds


def test_other_families_do_not_describe_themselves() -> None:
    config = tiny_config("gemma2")
    assert plain_class_of(config) is None
    model = build_skeleton(ModelDescriptor.from_config(config), config)
    with pytest.raises(FamilyError, match="gemma2"):
        ModelDescriptor.from_skeleton(model)


def test_stubs_know_nothing_of_the_weights_of_owned_blocks(tmp_path: Path) -> None:
    model = load_and_shard_model("auto", tiny_checkpoint(tmp_path), {0})
    stub = model.model.layers[2]
    assert isinstance(stub, Unowned)
    assert stub.self_attn.q_proj.weight.is_meta
    assert not model.model.layers[0].self_attn.q_proj.weight.is_meta
