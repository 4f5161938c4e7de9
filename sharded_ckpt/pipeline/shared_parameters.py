"""Parameters that several ranks hold copies of: the ends of a tied model, and what every rank has.

In one process they are one parameter, whose gradient is the sum over all its uses. So their gradients are
summed over the ranks, in one order: the copies stay equal, bit for bit, as long as the optimizers do alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patchers.errors import ConfigError
from patchers.names import fold
from sharded_ckpt.checkpoint.coordinator import together
from sharded_ckpt.model import build_skeleton

if TYPE_CHECKING:
    from sharded_ckpt.pipeline.connected_stage import ConnectedStage
    from sharded_ckpt.pipeline.links import Links


@dataclass(frozen=True)
class SharedParameter:
    """A parameter of which several ranks hold a copy.

    Attributes:
        name: Its name in the whole model.
        ranks: Who holds it, in ascending order; the first of them counts it in norms.
        local: This rank's copy; None if it has none.
    """

    name: str
    ranks: tuple[int, ...]
    local: nn.Parameter | None


def shared_parameters(stage: ConnectedStage) -> tuple[SharedParameter, ...]:
    """Find the parameters that several ranks hold, in one order on all ranks. Collective.

    Raises:
        ConfigError: Copies differ: then they are not one parameter, and training them as one would be wrong.
        CollectiveError: A rank's are offloaded.
    """
    if stage.links is None:
        return ()
    with together(stage.runtime.control, "finding the shared parameters"):
        require_here(stage.shard)
    ties = build_skeleton(stage.descriptor, stage.shard.config).all_tied_weights_keys
    untied = set(getattr(getattr(stage.shard, "load_report", None), "untied", ()))
    local = {
        name if name in untied else ties.get(name, name): parameter
        for name, parameter in stage.shard.named_parameters()
    }
    held: list[list[str]] = stage.runtime.control.gather(sorted(local), "finding the shared parameters")
    holders = {
        name: tuple(rank for rank, names in enumerate(held) if name in names)
        for name in sorted({name for names in held for name in names})
    }
    shared = tuple(
        SharedParameter(name, ranks, local.get(name)) for name, ranks in holders.items() if len(ranks) > 1
    )
    _require_equal(shared, stage.runtime.control.gather(_digests(shared), "comparing the shared parameters"))
    return shared


def require_here(shard: nn.Module) -> None:
    """Refuse a shard of which a part is in host memory or on disk, behind accelerate's hooks.

    Raises:
        ConfigError: It names the part.
    """
    elsewhere = [name for name, parameter in shard.named_parameters() if parameter.is_meta]
    if elsewhere:
        raise ConfigError(
            f"{fold(elsewhere)} is offloaded, so it cannot be trained: load the shard whole, or on more ranks"
        )


def sum_gradients(shared: Sequence[SharedParameter], rank: int, links: Links) -> None:
    """Give every copy of a shared parameter the sum of all copies' gradients, in the order of the ranks.

    Raises:
        ConfigError: A parameter is frozen on some of its ranks only.
    """
    for parameter in (parameter for parameter in shared if parameter.local is not None):
        first, *others = parameter.ranks
        if rank == first:
            _sum_here(parameter, others, links)
        else:
            _sum_there(parameter, first, links)
    links.settle()


def _sum_here(parameter: SharedParameter, others: Sequence[int], links: Links) -> None:
    copy = _required(parameter)
    for rank in others:
        frozen = not links.back.ask((1,), torch.bool, rank).wait().item()
        if frozen is copy.requires_grad:
            where = f"rank {rank}, but not on rank {parameter.ranks[0]}"
            raise ConfigError(
                f"{parameter.name} is {'frozen' if frozen else 'trained'} on {where}; both have copies of "
                "it: set requires_grad alike on both"
            )
        if not frozen:
            copy.grad = _gradient(copy) + links.back.ask(copy.shape, copy.dtype, rank).wait()
    if copy.requires_grad:
        for rank in others:
            links.forward.send(_gradient(copy), rank)


def _sum_there(parameter: SharedParameter, first: int, links: Links) -> None:
    copy = _required(parameter)
    links.back.send(torch.tensor([copy.requires_grad]), first)
    if copy.requires_grad:
        links.back.send(_gradient(copy), first)
        copy.grad = links.forward.ask(copy.shape, copy.dtype, first).wait()


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _required(parameter: SharedParameter) -> nn.Parameter:
    if parameter.local is None:
        raise ConfigError(f"{parameter.name} is not on this rank")
    return parameter.local


def _digests(shared: Sequence[SharedParameter]) -> dict[str, list[Any]]:
    """Return shape and two sums of each copy: cheap, and equal copies have equal ones."""
    digests = {}
    for parameter in shared:
        if parameter.local is not None:
            values = parameter.local.detach().double()
            digests[parameter.name] = [*values.shape, values.sum().item(), values.square().sum().item()]
    return digests


def _require_equal(shared: Sequence[SharedParameter], told: Sequence[Mapping[str, list[Any]]]) -> None:
    for parameter in shared:
        first, *others = parameter.ranks
        for rank in others:
            if told[rank][parameter.name] != told[first][parameter.name]:
                raise ConfigError(
                    f"ranks {first} and {rank} hold different values of {parameter.name}, which is one "
                    "parameter in the whole model; load both from the same checkpoint, or untie the config"
                )
