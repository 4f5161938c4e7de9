"""Tensors that FSDP2 has spread over a mesh of ranks: made whole to be written, cut to be filled.

In the files a tensor is whole whoever wrote it, so a model that FSDP2 has sharded and one that it has not
read each other's files. To write, every tensor is put together on one rank of its mesh, and each rank of the
mesh gets its share of the bytes. To read, every rank cuts its part out of the file: nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from patchers.errors import CheckpointError, ConfigError
from patchers.names import fold
from sharded_ckpt.checkpoint.coordinator import Coordinator, together

Meshes: TypeAlias = "dict[str, list[list[Any]]]"
"""By the ranks of a mesh: names and bytes of the tensors that are spread over it, sorted."""


def local_target(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor that is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def local_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that belongs here if it is spread like another one.

    Args:
        whole: All of it; or a DTensor that is spread in the same way.
        like: A DTensor; or a plain tensor, for which all of it belongs here.

    Raises:
        ConfigError: A DTensor was given for a plain tensor, or one that is spread otherwise.
    """
    if isinstance(whole, DTensor):
        check_layout(whole, like)
        return whole.to_local()
    return cut(whole, like).to_local() if isinstance(like, DTensor) else whole


def check_layout(value: DTensor, like: Tensor) -> None:
    """Raise unless a DTensor is spread as another tensor is.

    Raises:
        ConfigError: It is not; the text says what to pass.
    """
    if not isinstance(like, DTensor) or like.placements != value.placements:
        raise ConfigError(
            f"a DTensor spread as {value.placements} cannot be put where another layout is; "
            "pass the whole tensor (full_tensor())"
        )


def cut(whole: Tensor, like: DTensor) -> DTensor:
    """Return a whole tensor spread as another one is; every rank has all of it, so none sends anything."""
    mesh = like.device_mesh
    return distribute_tensor(whole.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def whole_tensors(tensors: Mapping[str, Tensor], control: Coordinator, where: object) -> dict[str, Tensor]:
    """Return tensors with every DTensor whole on one rank of its mesh, and absent on the others.

    Collective over `control`, and over the meshes. Each rank of a mesh gets about its share of the bytes.

    Args:
        tensors: Plain tensors, which stay as they are, and DTensors.
        control: All ranks.
        where: What is saved to, for errors.

    Raises:
        CheckpointError: The ranks of a mesh do not have the same tensors.
    """
    spread = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    mine = _meshes(spread)
    me = torch.distributed.get_rank() if spread else -1
    said = control.gather([me, mine], f"comparing the meshes of what is saved to {where}")
    with together(control, f"comparing the meshes of what is saved to {where}"):
        _refuse_unlike({rank: table for rank, table in said if table})
    if not any(table for _, table in said):
        return dict(tensors)
    with together(control, f"putting together what is saved to {where}"):
        owners = {name: rank for ranks, rows in mine.items() for name, rank in _deal(ranks, rows).items()}
        kept = {name: tensor for name, tensor in tensors.items() if name not in spread}
        for name in sorted(spread):
            whole = spread[name].full_tensor()
            if owners[name] == me:
                kept[name] = whole.cpu()
        return kept


def _meshes(spread: Mapping[str, DTensor]) -> Meshes:
    tables: Meshes = {}
    for name in sorted(spread):
        tensor = spread[name]
        ranks = ",".join(map(str, tensor.device_mesh.mesh.flatten().tolist()))
        tables.setdefault(ranks, []).append([name, tensor.numel() * tensor.element_size()])
    return tables


def _refuse_unlike(tables: Mapping[int, Meshes]) -> None:
    """Raise unless all ranks of a mesh have the same tensors on it; they would wait for each other."""
    for rank, table in tables.items():
        for ranks, rows in table.items():
            for other in map(int, ranks.split(",")):
                theirs = tables.get(other, {}).get(ranks, [])
                if theirs != rows:
                    odd = {str(name) for name, _ in rows} ^ {str(name) for name, _ in theirs}
                    raise CheckpointError(
                        f"ranks {rank} and {other} share a mesh, and do not have the same tensors on it: "
                        f"{fold(odd) or 'their sizes differ'}"
                    )


def _deal(ranks: str, rows: list[list[Any]]) -> dict[str, int]:
    """Give each tensor to the rank that has the fewest bytes so far; all ranks come to the same result."""
    load = dict.fromkeys(map(int, ranks.split(",")), 0)
    owners = {}
    for name, nbytes in sorted(rows, key=lambda row: (-row[1], row[0])):
        owners[name] = min(load, key=lambda rank: (load[rank], rank))
        load[owners[name]] += nbytes
    return owners
