"""Training steps whose gradients depend on names alone: so every split of a model over ranks trains alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sharded_ckpt.distribute.distribution import global_name


def drawn(name: str, shape: Iterable[int], step: int) -> torch.Tensor:
    """Numbers that a name and a step stand for."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {step}".encode()).digest()[:4], "little")
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def gradient(name: str, shape: Iterable[int], step: int) -> torch.Tensor:
    """The gradient of a parameter in a step; the two ends of a tied model get the same one."""
    return drawn(name.replace("lm_head", "model.embed_tokens"), shape, step)


def train(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], steps: Iterable[int]) -> None:
    """Take optimizer steps; a tied tensor gets one gradient, as one that is summed over the ranks would "
    "be."""
    for step in steps:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = gradient(global_name(name), parameter.shape, step).to(parameter.dtype)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def adam_of(model: nn.Module, **options: Any) -> torch.optim.Optimizer | None:
    """AdamW in two parameter groups, with decay and without; None where nothing is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "lr": 3e-3},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=1e-2, **options) if groups else None


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a model by plain names, each tied tensor under all of its names."""
    found = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for slot, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            found[f"{slot} of {name}"] = value
    return found


def same_values(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """The names under which two dicts differ, of those that the first one has."""
    return [
        name
        for name, tensor in found.items()
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name])
    ]
