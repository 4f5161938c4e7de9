"""What a checkpoint has besides tensors: small files of plain JSON, written and read whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sharded_ckpt.checkpoint.transaction import Transaction
from sharded_ckpt.training.checkpointing.dataloader_state import dataloader_file
from sharded_ckpt.training.checkpointing.layout import (
    FORMAT,
    METADATA_FILE,
    RUN_CONFIG_FILE,
    TRAIN_STATE_FILE,
)
from sharded_ckpt.training.checkpointing.legacy import CHECKPOINT_VERSION
from sharded_ckpt.training.checkpointing.rng_state import get_rng_state, rng_file
from sharded_ckpt.training.checkpointing.run_config import run_config_of
from sharded_ckpt.training.checkpointing.state_dict import _build_sharded_state_dict_metadata
from sharded_ckpt.training.checkpointing.targets import SaveTarget
from sharded_ckpt.training.checkpointing.tokenizer_assets import save_tokenizer_assets

if TYPE_CHECKING:
    from sharded_ckpt.runtime import Runtime
    from sharded_ckpt.training.checkpointing.train_state import GlobalState

VERSION: Final = 1
"""Of metadata.json and what it stands for."""


@dataclass(frozen=True)
class SmallFiles:
    """What one rank writes besides tensors, as it was when the save began.

    Attributes:
        files: The bytes of each file, by its name in the directory of the step.
        assets: Writes what never changes, the files of a tokenizer, into the directory of the step.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    assets: Callable[[Path], None] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any], assets: Callable[[Path], None] | None = None) -> SmallFiles:
        """Encode plain values as JSON, by file."""
        files = {n: json.dumps(v, indent=2, ensure_ascii=False).encode() + b"\n" for n, v in values.items()}
        return cls(files, assets)

    def write(self, save: Transaction) -> None:
        """Put the files into a save. What an earlier checkpoint of the step had besides does not stay."""
        save.supersede("*")
        for name, data in self.files.items():
            save.write_bytes(name, data)
        if self.assets is not None:
            self.assets(save.path)


def small_files_of(
    state: GlobalState,
    target: SaveTarget,
    runtime: Runtime,
    *,
    state_id: str | None,
    has_optimizer: bool,
    loader: Mapping[str, Any],
    rng_state: Mapping[str, Any] | None = None,
    module_name: str | None = None,
) -> SmallFiles:
    """Collect what this rank writes besides tensors: its random numbers, and on the first rank all else.

    Args:
        state: Step, config, random numbers.
        target: Where it goes.
        runtime: Which rank this is.
        state_id: What tells this save from any other.
        has_optimizer: Whether any rank saves an optimizer.
        loader: Where the data loader is, by the file that this rank writes of it.
        rng_state: The random numbers; by default as they are now.
        module_name: Sets apart the random numbers of one of several models.
    """
    config, rank = state.checkpoint_config, runtime.global_rank
    assets = partial(save_tokenizer_assets, state.tokenizer, state.tokenizer_config, runtime=runtime)
    values = dict(loader)
    if config.save_rng:
        now = get_rng_state(module_name=module_name, runtime=runtime) if rng_state is None else rng_state
        values[rng_file(rank, module_name)] = now
    if rank == 0 or target.is_local:
        contents = {
            "optimizer": has_optimizer,
            "rng": config.save_rng,
            "adapter": state.peft_config is not None,
        }
        values[TRAIN_STATE_FILE] = state.train_state.to_plain()
        values[RUN_CONFIG_FILE] = run_config_of(state)
        values[METADATA_FILE] = {
            "format": FORMAT,
            "version": VERSION,
            "checkpoint_version": CHECKPOINT_VERSION,
            "id": state_id,
            "iteration": target.iteration,
            "rank": rank if target.is_local else None,
            "world_size": runtime.world_size,
            "contents": contents,
            **_build_sharded_state_dict_metadata(False, config),
        }
    return SmallFiles.of(values, assets if config.save_tokenizer_assets else None)


def loader_files(said: Sequence[str | None], state: Any, rank: int) -> dict[str, Any]:
    """Return where the data loader is, by the file that this rank writes of it; none if it writes none.

    Ranks of one pipeline read the same data, and one file says where they are. Ranks that are elsewhere each
    have a file of their own.

    Args:
        said: A digest of what each rank's loader says; None of ranks that have none.
        state: What this rank's loader says.
        rank: This rank.
    """
    known = {digest for digest in said if digest is not None}
    if state is None or (len(known) == 1 and rank != [digest is not None for digest in said].index(True)):
        return {}
    return {dataloader_file(rank if len(known) > 1 else 0): state}


def digest_of(plain: Any) -> str | None:
    """Return what tells a plain value from any other one; None for None."""
    if plain is None:
        return None
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
