"""Comparing models tensor by tensor."""

from __future__ import annotations

import torch
from torch import nn

from patchers.substitutes import Unowned


def tensors_in(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, tied ones under each of their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def assert_same_tensors(model: nn.Module, reference: nn.Module, *, partial: bool = False) -> None:
    """Same names (those that are there, if partial), dtypes and values, and nothing on meta."""
    found, expected = tensors_in(model), tensors_in(reference)
    if partial:
        assert set(found) <= set(expected)
    else:
        assert set(found) == set(expected)
    for name, tensor in found.items():
        assert not tensor.is_meta, f"{name} is on meta"
        assert tensor.dtype == expected[name].dtype, f"{name} is {tensor.dtype}, not {expected[name].dtype}"
        assert torch.equal(tensor, expected[name]), f"{name} differs"


def storage_of_stubs(model: nn.Module) -> int:
    """Bytes that the stubs of a shard hold, those of the modules that they keep aside included."""
    stubs = [module for module in model.modules() if isinstance(module, Unowned)]
    kept = [module for stub in stubs for module in (stub, stub.__dict__["_original"])]
    tensors = [t for module in kept for t in (*module.parameters(), *module.buffers())]
    return sum(t.untyped_storage().nbytes() for t in tensors if not t.is_meta)
