from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from patchers.errors import ConfigError
from sharded_ckpt.surgery import set_submodule


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.register_module("optional", None)
        self.scale = nn.Parameter(torch.ones(2))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block() for _ in range(3))
        self.model.norms = nn.ModuleDict({"first": nn.LayerNorm(2)})
        self.lm_head = nn.Linear(2, 4)


class Lender(nn.Module):
    """Has the attributes of another module, as the stub of a block that is not owned does."""

    def __init__(self, lent: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "lent", lent)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "lent"), name)


@pytest.fixture
def model() -> Decoder:
    return Decoder()


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "model.layers.1",
        "model.layers.2.mlp",
        "model.layers.0.mlp.1",
        "model.norms.first",
        "model.layers",
    ],
)
def test_any_existing_place_is_replaced(model: Decoder, name: str) -> None:
    before = [key for key, _ in model.named_modules() if not key.startswith(name)]
    new = nn.Identity()
    set_submodule(model, name, new)
    assert model.get_submodule(name) is new
    assert [key for key, _ in model.named_modules() if not key.startswith(name)] == before


def test_an_optional_place_is_filled(model: Decoder) -> None:
    set_submodule(model, "model.layers.0.optional", nn.Identity())
    assert isinstance(model.model.layers[0].optional, nn.Identity)


def test_order_and_length_of_lists_stay(model: Decoder) -> None:
    first, _, last = model.model.layers
    new = nn.Identity()
    set_submodule(model, "model.layers.1", new)
    assert list(model.model.layers) == [first, new, last]


def test_a_shared_module_is_replaced_only_where_named(model: Decoder) -> None:
    shared = model.model.layers[0].mlp
    set_submodule(model, "model.layers.1.mlp", shared)
    set_submodule(model, "model.layers.0.mlp", nn.Identity())
    assert model.model.layers[1].mlp is shared


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "lm_haed",
            "there is no submodule 'lm_haed': the model is a Decoder without 'lm_haed'; "
            "it has model, lm_head. Did you mean 'lm_head'?",
        ),
        (
            "model.layers.3.mlp",
            "there is no submodule 'model.layers.3.mlp': "
            "'model.layers' is a ModuleList without '3'; it has 0-2",
        ),
        (
            "model.layers.-1",
            "there is no submodule 'model.layers.-1': 'model.layers' is a ModuleList without '-1'; ",
        ),
        (
            "model.layers.0.mpl.1",
            "'model.layers.0' is a Block without 'mpl'; it has mlp, optional. "
            "Did you mean 'model.layers.0.mlp'?",
        ),
        ("layers.0.mlp", "Did you mean 'model.layers.0.mlp'?"),
        ("lm_head.weight", "'lm_head' is a Linear without 'weight'; it has no submodules"),
        ("model.layers.0.scale", "'model.layers.0' is a Block without 'scale'; it has mlp, optional"),
        ("model.layers.0.optional.x", "'model.layers.0' is a Block without 'optional'"),
        ("model..layers", "'model' is a Module without ''; it has layers, norms"),
        ("", "the module name is empty; the model itself cannot be replaced from within"),
    ],
)
def test_a_wrong_path_names_what_exists_and_changes_nothing(model: Decoder, name: str, text: str) -> None:
    before = str(model)
    with pytest.raises(ConfigError) as failure:
        set_submodule(model, name, nn.Identity())
    assert text in str(failure.value)
    assert str(model) == before


def test_lent_attributes_are_not_places(model: Decoder) -> None:
    set_submodule(model, "model.layers.0", Lender(model.model.layers[0]))
    with pytest.raises(
        ConfigError, match=r"'model\.layers\.0' is a Lender without 'mlp'; it has no submodules"
    ):
        set_submodule(model, "model.layers.0.mlp", nn.Identity())


@pytest.mark.parametrize("wrong", [None, nn.Identity, torch.zeros(2)])
def test_only_modules_are_put_in(model: Decoder, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"new_submodule for 'lm_head' is a .*, not a Module"):
        set_submodule(model, "lm_head", wrong)
