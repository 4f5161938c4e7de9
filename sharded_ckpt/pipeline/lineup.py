"""Which rank runs which blocks, one after the other. Pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patchers.errors import OwnershipError
from patchers.kv_sharing import blocks_that_share
from patchers.names import fold_indices

_ONE_RANK = (
    ". There is only one rank: start several with `torchrun --nproc-per-node N script.py`, and call "
    "torch.distributed.init_process_group() in it before loading"
)


@dataclass(frozen=True)
class Lineup:
    """The ranks of a pipeline in the order in which hidden states go through them.

    Attributes:
        owned: The blocks of each rank, by rank. A rank that owns nothing takes no part.
        num_blocks: How many blocks the model has.

    Raises:
        OwnershipError: The blocks are not all there, once each, in contiguous runs in the order of the ranks.

    Example:
        >>> lineup = Lineup(((0, 1), (), (2,)), num_blocks=3)
        >>> lineup.ranks, lineup.head_rank, lineup.before(2), lineup.after(2)
        ((0, 2), 2, 0, None)
    """

    owned: tuple[tuple[int, ...], ...]
    num_blocks: int

    def __post_init__(self) -> None:
        if [block for run in self.owned for block in run] != list(range(self.num_blocks)):
            told = ", ".join(
                f"rank {rank}: {fold_indices(run) if run else 'none'}" for rank, run in enumerate(self.owned)
            )
            raise OwnershipError(
                f"a pipeline needs all {self.num_blocks} blocks once, in contiguous runs in the order of the "
                f'ranks; they own {told}. owned_block_indexes="auto", or a contiguous plan_ownership, gives '
                "such runs" + (_ONE_RANK if len(self.owned) == 1 else "")
            )

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that own blocks."""
        return tuple(rank for rank, run in enumerate(self.owned) if run)

    @property
    def head_rank(self) -> int:
        """The rank of the last block, which has the final norm and the head, too."""
        return self.ranks[-1]

    def before(self, rank: int) -> int | None:
        """Return the rank from which a rank's hidden states come; None for the first one."""
        return _neighbour(self.ranks, rank, -1)

    def after(self, rank: int) -> int | None:
        """Return the rank to which a rank's hidden states go; None for the last one."""
        return _neighbour(self.ranks, rank, 1)


def require_own_keys(lineup: Lineup, config: Any) -> None:
    """Refuse a lineup in which blocks would read keys and values that another rank has.

    Args:
        lineup: Who runs what.
        config: A transformers config.

    Raises:
        OwnershipError: It says which blocks must stay together.
    """
    sharing = blocks_that_share(config)
    ranks = [rank for rank, run in enumerate(lineup.owned) if set(run) & set(sharing)]
    if len(ranks) > 1:
        raise OwnershipError(
            f"blocks {fold_indices(sharing)} of {config.model_type} share keys and values, which do not "
            f"travel from rank to rank: one rank must own all of them, not ranks {fold_indices(ranks)}"
        )


def _neighbour(ranks: Sequence[int], rank: int, step: int) -> int | None:
    if rank not in ranks:
        return None
    at = ranks.index(rank) + step
    return ranks[at] if 0 <= at < len(ranks) else None
