"""What is to be planned: a checkpoint, a config alone, or weights without a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchers.errors import CheckpointNotFoundError
from patchers.names import fold_indices
from sharded_ckpt.checkpoint.index import open_index
from sharded_ckpt.checkpoint.source import (
    INDEX_SUFFIX,
    find_config,
    holds_safetensors,
    open_source,
    parse_config,
)
from sharded_ckpt.ownership.costs import ModelCosts
from sharded_ckpt.ownership.counting import costs_of, quantisation_of
from sharded_ckpt.ownership.plan import OwnershipPlan
from sharded_ckpt.report.model_blocks import ModelBlocks, model_blocks
from sharded_ckpt.report.rank_reads import RankReads, rank_reads, stored_costs


@dataclass(frozen=True)
class PlanTarget:
    """What is to be planned.

    Attributes:
        location: The checkpoint; None for a config that is in no checkpoint.
        config: The content of config.json; None where there is none.
        has_weights: Whether there are safetensors files.
    """

    location: str | None
    config: Mapping[str, Any] | None
    has_weights: bool

    @classmethod
    def of(cls, checkpoint: str) -> PlanTarget:
        """Look at what a user names.

        Args:
            checkpoint: A directory, a file in it, a hub id, a URL, or a config.json of any name.

        Raises:
            CheckpointNotFoundError: There is nothing at that place, or neither config nor weights.
            CheckpointError: The config cannot be read.
        """
        path = Path(checkpoint)
        if path.suffix == ".json" and not path.name.endswith(INDEX_SUFFIX) and path.is_file():
            if path.name != "config.json":
                return cls(None, parse_config(path.read_bytes(), checkpoint), False)
            checkpoint = str(path.parent)
        source = open_source(checkpoint)
        has_weights = holds_safetensors(source)
        config = find_config(source)
        if config is None and not has_weights:
            open_index(source)  # raises, and says what is there instead
        return cls(checkpoint, config, has_weights)

    @property
    def name(self) -> str:
        """Of the model, for titles."""
        return Path(self.location or "").name or "model"

    @property
    def quantisation(self) -> str | None:
        """The method by which its weights are quantised, if they are."""
        return None if self.config is None else quantisation_of(self.config)

    def costs(self, by: str, batch: int, length: int) -> ModelCosts:
        """Count by the config; by headers what it does not tell: the bytes of quantised weights in files.

        Raises:
            CheckpointNotFoundError: It takes a config, and there is none.
            ConfigError: They cannot be counted.
        """
        are_files_asked = by == "bytes" and (self.config is None or self.quantisation is not None)
        if self.location is not None and self.has_weights and are_files_asked:
            return stored_costs(self.location)
        if self.config is None:
            raise CheckpointNotFoundError(
                f"{self.location}: there is no config.json, without which only the bytes in files can "
                "be counted: leave out --memory and --by, or write a config.json"
            )
        return costs_of(self.location or self.config, by=by, batch=batch, length=length)

    def reads(self, plan: OwnershipPlan) -> list[RankReads] | None:
        """Say what the ranks read; None where there are no weights."""
        return rank_reads(self.location, plan) if self.location is not None and self.has_weights else None

    def blocks(self) -> ModelBlocks:
        """Say what each block is."""
        return model_blocks(self.config or {} if self.location is None else self.location)

    def notes(self, plan: OwnershipPlan) -> list[str]:
        """Say what a reader of the plan should know."""
        notes = []
        if self.config is None:
            notes.append("there is no config.json: blocks at the end without any tensor are not counted")
        if self.quantisation is not None:
            notes.append(
                f'the weights are quantised ({self.quantisation}): "bytes" are those of the files where '
                'there are any, "bytes+kv" those in memory, where weights are dequantised as they are loaded'
            )
        if idle := [rank for rank, owned in enumerate(plan.blocks) if not owned]:
            ranks = f"rank{'s'[: len(idle) != 1]} {fold_indices(idle)} own{'s'[: len(idle) == 1]}"
            blocks = f"{plan.num_blocks} block{'s'[: plan.num_blocks != 1]}"
            notes.append(f"{ranks} nothing: {blocks} for {plan.world_size} ranks")
        return notes
