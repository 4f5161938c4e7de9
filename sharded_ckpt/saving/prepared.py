"""A complete checkpoint of what the ranks hold: agreed upon and compared, ready to be written."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedConfig

from patchers.deci_x import BlockConfigs
from patchers.dialects import Dialect
from patchers.names import fold
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.checkpoint.transaction import Transaction
from sharded_ckpt.saving.checkpoint_files import CheckpointFiles, Request
from sharded_ckpt.saving.saved_tensors import SavedTensors
from sharded_ckpt.saving.shared_tensors import Division

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedCheckpoint:
    """What this rank writes of a checkpoint.

    Attributes:
        directory: Where it goes.
        tensors: By their names in memory.
        division: Who writes what.
        files: What else there is, on the rank that writes it.
    """

    directory: Path
    tensors: Mapping[str, Tensor]
    division: Division
    files: CheckpointFiles | None

    @classmethod
    def gather(
        cls,
        model_shard: Any,
        directory: str | os.PathLike[str],
        control: Coordinator,
        *,
        config: PreTrainedConfig | None = None,
        block_configs: BlockConfigs | Literal["infer"] | None = None,
        dialect: Dialect | str | None = None,
        source: str | os.PathLike[str] | None = None,
    ) -> PreparedCheckpoint:
        """Agree with all ranks on what is written by whom, and compare it with the config; collective.

        See `save_sharded_checkpoint` for arguments and errors.
        """
        path = Path(directory)
        with together(control, f"preparing to save to {path}"):
            request = Request.of(model_shard, config, block_configs, dialect, source)
            request.check_built()
            mine = SavedTensors.of(model_shard, request.ties)
        shares, division = mine.divide(control, path)
        request.agree(control)
        files = None
        with together(control, f"preparing the config of {path}"):
            if control.rank == 0:
                files = CheckpointFiles.of(request, shares, untied=bool(division.untied), target=path)
        return cls(path, mine.written_by(control.rank, division), division, files)

    def warn(self) -> None:
        """Tell what is to be known of the checkpoint, once it is there; one rank does."""
        if self.files is None:
            return
        if self.division.untied:
            text = untied_text(self.division)
            logger.warning("%s: %s, and config.json says tie_word_embeddings: false", self.directory, text)
        if self.files.warning:
            logger.warning("%s", self.files.warning)

    def write_files(self, save: Transaction, folder: str = "") -> None:
        """Put what there is besides tensors into a save, in a folder of it (which ends in `/`)."""
        if self.files is not None:
            self.files.write(save, folder)


def untied_text(division: Division) -> str:
    """Return what is to be said of tied names that hold different values."""
    pairs = [f"{target} and {source}" for target, source in division.untied.items()]
    return f"{fold(pairs)} are tied by the config, but hold different values: both were written"
