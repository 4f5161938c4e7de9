"""What is done to state dicts: converters, modes, dtypes, and the stock converters' round trips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from patchers.errors import CheckpointError, ConfigError, MissingKeysError
from sharded_ckpt.training import (
    AdapterKeys,
    BaseStateDictAdapter,
    DoRAKeys,
    DropExtraState,
    GLUInterleave,
    ModelWrapper,
    PeftNames,
    PrefixKeys,
    SplitGateUp,
    StateDictConverter,
    StateDictMode,
    StateDictTransforms,
)
from sharded_ckpt.training.glu import _deinterleave_glu_tensor, _interleave_glu_tensor


class LowRank(nn.Module):
    """A linear layer with a low-rank addition of scale 2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3), requires_grad=False)
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 2))


class Merging:
    """Owns the low-rank keys; undone by adding them to the weight."""

    def key_filter(self, fqn: str) -> bool:
        return "lora_" in fqn

    def state_dict_transform(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        delta = 2 * state_dict["lora_b"] @ state_dict["lora_a"]
        return {"weight": state_dict["weight"] + delta}

    def state_dict_adapter(self) -> BaseStateDictAdapter | None:
        return PeftNames()


class Scaling:
    """Owns nothing, and notes its turn."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name, self.turns = name, turns

    def key_filter(self, fqn: str) -> bool:
        return False

    def state_dict_transform(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.turns.append(self.name)
        return state_dict

    def state_dict_adapter(self) -> BaseStateDictAdapter | None:
        return None


class Renaming(BaseStateDictAdapter):
    def to_hf(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        return {f"hf.{name}": value for name, value in state_dict.items()}

    def from_hf(self, hf_state_dict: Mapping[str, Any]) -> dict[str, Any]:
        return {name.removeprefix("hf."): value for name, value in hf_state_dict.items()}


# Modes -----------------------------------------------------------------------------------------------------


def test_each_mode_gives_its_keys_and_the_export_is_merged_exactly():
    model = LowRank()
    wrapper = ModelWrapper(model, transforms=StateDictTransforms(converters=[Merging()]))
    keys = {mode: set(wrapper.state_dict(mode)) for mode in StateDictMode}
    assert keys[StateDictMode.FULL] == {"weight", "lora_a", "lora_b"}
    assert keys[StateDictMode.BASE] == keys[StateDictMode.EXPORT] == {"weight"}
    assert keys[StateDictMode.ADAPTER] == {"lora_a", "lora_b"}
    assert keys[StateDictMode.BASE] | keys[StateDictMode.ADAPTER] == keys[StateDictMode.FULL]
    merged = model.weight + 2 * model.lora_b @ model.lora_a
    assert torch.equal(wrapper.state_dict("export")["weight"], merged)
    assert wrapper.has_key_filter
    assert wrapper.has_frozen_params
    with pytest.raises(
        ConfigError, match=r"mode of a state dict is 'last'; it must be one of full, base, adapter"
    ):
        wrapper.state_dict("last")


def test_without_converters_every_mode_but_adapter_is_the_whole_state():
    wrapper = ModelWrapper(nn.Linear(2, 2))
    assert list(wrapper.state_dict("export")) == list(wrapper.state_dict("base")) == ["weight", "bias"]
    assert wrapper.state_dict("adapter") == {}
    assert not wrapper.has_key_filter
    assert not wrapper.has_frozen_params


def test_hooks_can_be_given_as_functions_but_not_beside_transforms():
    undo = {"bias": lambda sd: {**sd, "bias": sd["bias"] * 0}}["bias"]
    model = nn.Linear(2, 2)
    wrapper = ModelWrapper(model, key_filter=lambda fqn: fqn == "bias", state_dict_transform=undo)
    assert wrapper.state_dict("export")["bias"].eq(0).all()
    assert not model.bias.eq(0).all()
    with pytest.raises(ConfigError, match=r"not both"):
        ModelWrapper(model, key_filter=lambda fqn: False, transforms=StateDictTransforms())


def test_nothing_is_cached():
    model = nn.Linear(2, 2)
    wrapper = ModelWrapper(model)
    wrapper.state_dict()
    model.weight = nn.Parameter(torch.ones(2, 2))
    assert wrapper.state_dict()["weight"].eq(1).all()


# Composition -----------------------------------------------------------------------------------------------


def test_converters_are_undone_in_reverse_order():
    turns: list[str] = []
    converters = [Scaling("first", turns), Scaling("second", turns)]
    assert all(isinstance(converter, StateDictConverter) for converter in converters)
    StateDictTransforms(converters=converters).state_dict_transform({"weight": torch.zeros(1)})
    assert turns == ["second", "first"]


def test_a_key_of_two_converters_is_refused():
    transforms = StateDictTransforms(converters=[Merging(), AdapterKeys(lambda fqn: fqn.endswith("_a"))])
    with pytest.raises(ConfigError, match=r"Merging and AdapterKeys both own lora_a: a key belongs to one"):
        ModelWrapper(LowRank(), transforms=transforms).state_dict("base")


def test_what_lacks_a_hook_is_no_converter():
    with pytest.raises(ConfigError, match=r"a Renaming is no converter: it needs key_filter\(fqn\)"):
        StateDictTransforms(converters=[Renaming()])  # type: ignore[list-item]


def test_adapters_translate_their_own_keys_and_the_models_the_rest():
    transforms = StateDictTransforms(Renaming(), converters=[Merging()])
    state = {"weight": torch.zeros(1), "q.lora_magnitude": torch.zeros(2)}
    assert list(transforms.apply_to_hf(state)) == ["hf.weight", "base_model.model.q.lora_magnitude_vector"]
    assert list(transforms.apply_from_hf({"hf.weight": 1})) == ["weight"]
    with pytest.raises(ConfigError, match=r"without an adapter: pass sd_adapter="):
        StateDictTransforms().apply_to_hf(state)


def test_two_adapters_may_not_give_one_name_or_place_one_tensor_twice():
    class Same(Merging):
        def state_dict_adapter(self) -> BaseStateDictAdapter:
            return Fixed()

    class Fixed(Renaming):
        def to_hf(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
            return {"hf.weight": 0}

    with pytest.raises(CheckpointError, match=r"two adapters give hf\.weight: one would overwrite the other"):
        StateDictTransforms(Renaming(), converters=[Same()]).apply_to_hf({"weight": 1, "lora_a": 2})
    first, second = Renaming(fqn_to_index_mapping={"a": 1}), Renaming(fqn_to_index_mapping={"a": 2, "b": 1})
    assert StateDictTransforms(second).fqn_to_index_mapping == {"a": 2, "b": 1}
    assert StateDictTransforms().fqn_to_index_mapping is None
    transforms = StateDictTransforms(first, converters=[AdapterKeys(adapter=second)])
    with pytest.raises(ConfigError, match=r"two adapters place a in different files: 1 and 2"):
        _ = transforms.fqn_to_index_mapping


# Dtypes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("of", "to"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_only_ordinary_floats_are_cast_and_the_live_model_stays(of, to):
    weight = torch.ones(2, dtype=of)
    state = {
        "weight": weight,
        "steps": torch.tensor(3),
        "mask": torch.tensor([True]),
        "packed": torch.ones(2).to(torch.float8_e4m3fn),
        "_extra_state": {"a": 1},
    }
    exported = StateDictTransforms(export_dtype=to).apply_dtype_convert(state)
    assert exported["weight"].dtype == to
    assert weight.dtype == of
    assert all(exported[name] is value for name, value in state.items() if name != "weight")


def test_adapters_are_merged_before_the_cast():
    model = LowRank()
    transforms = StateDictTransforms(export_dtype=torch.bfloat16, converters=[Merging()])
    merged = (model.weight + 2 * model.lora_b @ model.lora_a).bfloat16()
    assert torch.equal(transforms.export(ModelWrapper(model).state_dict())["weight"], merged)


def test_an_export_dtype_is_a_floating_one():
    with pytest.raises(ConfigError, match=r"export_dtype is torch\.int8; it must be one of torch\.bfloat16"):
        StateDictTransforms(export_dtype=torch.int8)


# Stock converters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 6, 12])
@pytest.mark.parametrize("shape", [(24,), (24, 5), (24, 2, 3)])
def test_interleaving_is_undone_exactly(size, shape):
    tensor = torch.randn(shape)
    mixed = _interleave_glu_tensor(tensor, size)
    assert torch.equal(_deinterleave_glu_tensor(mixed, size), tensor)
    assert torch.equal(mixed[:size], tensor[:size])
    assert torch.equal(mixed[size : 2 * size], tensor[12 : 12 + size])


def test_each_block_has_its_own_interleaving_and_other_names_stay():
    names = [f"model.layers.{i}.mlp.gate_up_proj.weight" for i in range(3)] + [
        "model.layers.0.mlp.down_proj.weight"
    ]
    state = {name: torch.randn(8 + 4 * i, 3) for i, name in enumerate(names)}
    converter = GLUInterleave({0: 2, 1: 3})
    memory = converter.from_hf(state)
    assert torch.equal(memory[names[0]], _interleave_glu_tensor(state[names[0]], 2))
    assert torch.equal(memory[names[1]], _interleave_glu_tensor(state[names[1]], 3))
    assert memory[names[2]] is state[names[2]]
    assert memory[names[3]] is state[names[3]]
    assert all(torch.equal(tensor, state[name]) for name, tensor in converter.to_hf(memory).items())
    with pytest.raises(ConfigError, match=rf"{names[0]}: .* 4 rows each, which 3 does not divide"):
        GLUInterleave(3).from_hf(state)


def test_a_fused_projection_is_split_in_its_middle_and_joined():
    state = {"l.0.gate_up_proj.weight": torch.randn(6, 2), "l.1.gate_up_proj.weight": torch.randn(10, 2)}
    split = SplitGateUp().to_hf(state)
    assert list(split)[:2] == ["l.0.gate_proj.weight", "l.0.up_proj.weight"]
    assert split["l.1.up_proj.weight"].shape == (5, 2)
    joined = SplitGateUp().from_hf(split)
    assert list(joined) == list(state)
    assert all(torch.equal(joined[n], t) for n, t in state.items())
    del split["l.0.gate_proj.weight"]
    with pytest.raises(
        MissingKeysError, match=r"l\.0\.gate_proj\.weight is missing: l\.0\.up_proj\.weight is one half"
    ):
        SplitGateUp().from_hf(split)


@pytest.mark.parametrize(
    ("converter", "memory", "files"),
    [
        (PrefixKeys("base_model.model."), "lm_head.weight", "base_model.model.lm_head.weight"),
        (PrefixKeys("p.", ["lm_head.weight"]), "lm_head.weight", "lm_head.weight"),
        (DoRAKeys(), "q.lora_magnitude", "q.lora_magnitude_vector"),
        (PeftNames(), "q.lora_magnitude", "base_model.model.q.lora_magnitude_vector"),
    ],
)
def test_names_go_to_files_and_back(converter, memory, files):
    assert list(converter.to_hf({memory: 0})) == [files]
    assert list(converter.from_hf({files: 0})) == [memory]


def test_only_extra_states_are_dropped():
    state = {"a._extra_state": 0, "a.weight": 1, "_extra_state_of": 2}
    assert list(DropExtraState().to_hf(state)) == ["a.weight", "_extra_state_of"]


def test_storage_is_done_in_reverse_and_undone_in_order():
    transforms = StateDictTransforms(converters=[SplitGateUp(), PrefixKeys("p.")])
    stored = transforms.to_storage({"m.gate_up_proj.weight": torch.randn(4, 2)})
    assert list(stored) == ["p.m.gate_proj.weight", "p.m.up_proj.weight"]
    assert list(transforms.from_storage(dict(stored))) == ["m.gate_up_proj.weight"]
