"""Ranks that deal blocks out, each for itself: do they load one model, and leave no block to nobody?"""

from __future__ import annotations

import hashlib

from patchers.errors import ConfigError
from sharded_ckpt.loading.loader import ShardLoader
from sharded_ckpt.ownership.plan import check_disjoint_cover


def agree_on_blocks(loader: ShardLoader) -> None:
    """Make sure that all ranks load the same model, and that each block is somebody's. Collective.

    Args:
        loader: Prepared. Where some rank was told its blocks, nothing needs to be agreed on.

    Raises:
        ConfigError: On all ranks: they load different models, or leave a block to nobody.
    """
    if loader.runtime.world_size == 1:
        return
    doing = f"dealing out the blocks of {loader.source.location}"
    facts = {
        "auto": loader.options.owned == "auto",
        "model": _fingerprint(loader),
        "owned": sorted(loader.owned),
    }
    ranks = loader.runtime.control.gather(facts, doing)
    if not all(rank["auto"] for rank in ranks):
        return
    models = [rank["model"] for rank in ranks]
    if len(set(models)) > 1:
        other = next(rank for rank, model in enumerate(models) if model != models[0])
        raise ConfigError(
            f"{doing}: rank {other} loads another model than rank 0 (other tensors, or other block "
            "configs); all ranks must load the same one, or be told their owned_block_indexes"
        )
    check_disjoint_cover([rank["owned"] for rank in ranks], loader.num_blocks)


def _fingerprint(loader: ShardLoader) -> str:
    shapes = sorted((name, tuple(tensor.shape)) for name, tensor in loader.whole.items())
    return hashlib.sha256(repr((loader.descriptor.family, shapes)).encode()).hexdigest()
