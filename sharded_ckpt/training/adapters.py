"""Adapters (LoRA, DoRA and what else peft knows) as state, under the names that peft gives them in files.

Of a model made by peft, peft itself says what belongs to the adapter. Of any other model the adapter is what
is
trained: every parameter with `requires_grad`. In both cases biases and modules that are trained beside the
low-rank matrices are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from patchers.errors import FamilyError, MissingKeysError
from patchers.names import fold
from sharded_ckpt.distribute.distribution import global_name
from sharded_ckpt.saving.saved_tensors import unwrapped
from sharded_ckpt.training.dtensors import local_of, local_target
from sharded_ckpt.training.key_names import PEFT_PREFIX, _add_outer_prefix, _rename_dora_keys_to_hf

_ADAPTER_PARTS: Final = re.compile(r"(^|\.)(lora_\w+|modules_to_save)(\.|$)")
_INNER: Final = re.compile(r"\.(base_layer|original_module)(?=\.)")


def made_by_peft(part: nn.Module) -> bool:
    """Return whether a model carries adapters that peft manages."""
    return bool(getattr(unwrapped(part), "peft_config", None))


def is_adapter_name(name: str) -> bool:
    """Return whether a name in a model made by peft is that of a part of an adapter.

    Example:
        >>> is_adapter_name("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
        True
        >>> is_adapter_name("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
        False
    """
    return _ADAPTER_PARTS.search(name) is not None


def base_name(name: str) -> str:
    """Return the name that a base weight has without peft around it.

    Example:
        >>> base_name("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
        'model.layers.0.self_attn.q_proj.weight'
    """
    return _INNER.sub("", name.removeprefix(PEFT_PREFIX))


def adapter_tensors(part: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors of a model's adapter by the names that peft gives them in its files.

    Args:
        part: A model made by peft, of whose adapters the active one is taken; or any model with trained
            parameters.

    Raises:
        FamilyError: peft keeps tensors of this kind of adapter only in copies.
    """
    model = unwrapped(part)
    if not made_by_peft(model):
        trained = _get_peft_state_dict(model)
        _rename_dora_keys_to_hf(trained)
        _add_outer_prefix(trained, PEFT_PREFIX)
        return trained
    said = _said_by_peft(model)
    live = {_address(tensor): name for name, tensor in _tensors(model).items()}
    if copies := [name for name, tensor in said.items() if tensor.numel() and _address(tensor) not in live]:
        raise FamilyError(
            f"peft gives {fold(copies)} only as copies: save such an adapter by itself with save_pretrained"
        )
    known = {_address(tensor) for tensor in said.values()}
    others = {
        n: p.detach() for n, p in model.named_parameters() if p.requires_grad and _address(p) not in known
    }
    _add_outer_prefix(others, PEFT_PREFIX)
    return {**said, **others}


def adapter_config(part: nn.Module) -> dict[str, Any] | None:
    """Return what peft writes to adapter_config.json, as plain data; None if peft did not make the model."""
    model: Any = unwrapped(part)
    if not made_by_peft(model):
        return None
    config = model.peft_config[_active(model)]
    said = {**config.to_dict(), "inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in said.items()}


def _get_peft_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by their global names; they share memory with the model."""
    return {
        global_name(name): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _set_peft_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Copy tensors into the trained parameters of the same global names.

    Returns:
        The keys that no trained parameter has the name of; nothing was done with them.

    Raises:
        MissingKeysError: None of the keys has.
    """
    targets = {global_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    known = {key: targets[key] for key in state_dict if key in targets}
    if state_dict and not known:
        raise MissingKeysError(
            f"no trained parameter of the {type(model).__name__} has one of these names: {fold(state_dict)}; "
            f"it has {fold(targets) or 'none'}"
        )
    with torch.no_grad():
        for key, parameter in known.items():
            local_target(parameter).copy_(local_of(state_dict[key], parameter))
    return [key for key in state_dict if key not in known]


def _said_by_peft(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    # False: peft would ask the hub whether the vocabulary has grown; trained embeddings come in any case
    state = get_peft_model_state_dict(model, adapter_name=_active(model), save_embedding_layers=False)
    _add_outer_prefix(state, PEFT_PREFIX)
    return dict(state)


def _active(model: Any) -> str:
    active = model.active_adapter() if callable(model.active_adapter) else model.active_adapter
    return active if isinstance(active, str) else active[0]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _address(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return local_target(tensor).data_ptr(), tuple(tensor.shape)
