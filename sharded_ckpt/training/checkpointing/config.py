"""Where, when and what of training is saved and loaded: one validated value."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from patchers.errors import ConfigError
from sharded_ckpt.checkpoint.local import user_path
from sharded_ckpt.training.checkpointing.layout import _NON_PERSISTENT_CKPT_SUBDIR, SAFETENSORS

Due: TypeAlias = Literal["persistent", "non_persistent"]

_STRICTNESS: Final = (
    "assume_ok_unexpected",
    "log_unexpected",
    "log_all",
    "raise_unexpected",
    "raise_all",
    "return_unexpected",
    "return_all",
    "ignore_all",
)
_CHOICES: Final = {
    "async_worker": ("thread", "process"),
    "non_persistent_ckpt_type": (None, "global", "local"),
    "dist_ckpt_strictness": _STRICTNESS,
}
_PATHS: Final = (
    "save",
    "load",
    "pretrained_checkpoint",
    "non_persistent_global_ckpt_dir",
    "non_persistent_local_ckpt_dir",
)
_COUNTS: Final = {"ckpt_step": 0, "save_interval": 1, "non_persistent_save_interval": 1}


@dataclass(frozen=True)
class CheckpointConfig:
    """What a training wants of its checkpoints. Everything is validated when it is made.

    A training that restarts with the same arguments names one directory as `save` and `load`: it resumes from
    what is there, and starts fresh if nothing is there yet. A `load` that is another directory must hold a
    checkpoint.

    Attributes:
        save: Where checkpoints go; without it nothing is saved.
        load: Where they are resumed from: the directory of all of them, or of one step.
        pretrained_checkpoint: Weights to start from when there is nothing to resume: a checkpoint of Hugging
            Face, or one of these directories. Step, optimizer and random numbers start fresh.
        ckpt_step: Resume from this step, not from the one that the tracker names.
        ckpt_format: `"safetensors"`, which any number of ranks reads.
        save_interval: Steps between two checkpoints.
        save_first_step: Save after the first step, too: what cannot be saved is found out then.
        save_optim: Whether optimizers and schedulers are saved.
        load_optim: Whether they are loaded.
        save_rng: Whether the states of the random-number generators are saved.
        load_rng: Whether they are loaded.
        finetune: Take only weights out of `load`, and begin at step 0.
        exit_on_missing_checkpoint: Whether it is an error that there is nothing to resume, also where `load`
            is `save`.
        fall_back: Whether an older checkpoint is taken if the newest cannot be read. It is said in a warning.
        async_save: Whether training goes on while files are written. Call `finalize_async_saves` after each
            step, and with `terminate` in the end.
        async_worker: Who writes them: a `"thread"`, or a `"process"`.
        dist_ckpt_strictness: What to do about tensors that the checkpoint or the model lacks: see
            `StrictHandling`.
        most_recent_k: How many checkpoints are kept besides those that must not go; -1 for all.
        non_persistent_ckpt_type: Of the short-lived checkpoints between two others: `"global"`, in a
            directory that all ranks share, or `"local"`, each rank on a disk of its own.
        non_persistent_save_interval: Steps between two short-lived checkpoints.
        non_persistent_global_ckpt_dir: Where these go; by default `non_persistent/` in the others' directory.
        non_persistent_local_ckpt_dir: Where each rank's own go.
        non_persistent_recent_k: How many of them are kept.
        save_tokenizer_assets: Whether the tokenizer's files are part of a checkpoint.
        also_save_hf_checkpoint: Whether `hf/` in it is the model as Hugging Face's loaders read it.
        custom_manager_class: A class that is a `CheckpointManager`, or where it is: `"package.module.Class"`.
        durable: Whether a checkpoint must survive a power cut before it counts.
        max_shard_size: Bytes of tensors in one file, or a text such as `"5GB"`.
        storage_writers_per_rank: Threads of `save_fsdp_dtensor_checkpoint`.

    Raises:
        ConfigError: A value, or two of them together, make no sense. It is a `ValueError`.

    Example:
        >>> config = CheckpointConfig(save="runs/a", load="runs/a", save_interval=3)
        >>> [step for step in range(1, 8) if config.due(step, last=step == 7)]
        [3, 6, 7]
    """

    save: str | os.PathLike[str] | None = None
    load: str | os.PathLike[str] | None = None
    pretrained_checkpoint: str | os.PathLike[str] | None = None
    ckpt_step: int | None = None
    ckpt_format: str = SAFETENSORS
    save_interval: int | None = None
    save_first_step: bool = False
    save_optim: bool = True
    load_optim: bool = True
    save_rng: bool = True
    load_rng: bool = True
    finetune: bool = False
    exit_on_missing_checkpoint: bool = False
    fall_back: bool = False
    async_save: bool = False
    async_worker: Literal["thread", "process"] = "thread"
    dist_ckpt_strictness: str = "raise_all"
    most_recent_k: int = -1
    non_persistent_ckpt_type: Literal["global", "local"] | None = None
    non_persistent_save_interval: int | None = None
    non_persistent_global_ckpt_dir: str | os.PathLike[str] | None = None
    non_persistent_local_ckpt_dir: str | os.PathLike[str] | None = None
    non_persistent_recent_k: int = 2
    save_tokenizer_assets: bool = True
    also_save_hf_checkpoint: bool = False
    custom_manager_class: str | type[Any] | None = None
    durable: bool = True
    max_shard_size: int | str | None = None
    storage_writers_per_rank: int = 1

    def __post_init__(self) -> None:
        self._check_values()
        self._check_counts()
        self._check_needs()
        self._check_contradictions()

    def due(self, step: int, *, last: bool = False) -> Due | None:
        """Return what is to be saved after a step, if anything is.

        Args:
            step: Steps taken so far.
            last: Whether training ends here: it always ends with a checkpoint, if there is a place for one.
        """
        if self.save is not None:
            first = self.save_first_step and step == 1
            if last or first or (self.save_interval is not None and step % self.save_interval == 0):
                return "persistent"
        interval = self.non_persistent_save_interval
        return "non_persistent" if interval is not None and step % interval == 0 else None

    @property
    def resumes_itself(self) -> bool:
        """Whether `load` is `save`, so that nothing being there yet means that training begins."""
        return self.save is not None and self.load is not None and _same(self.save, self.load)

    @property
    def non_persistent_directory(self) -> Path | None:
        """Where short-lived checkpoints that all ranks share are, if there are any."""
        if self.non_persistent_ckpt_type != "global":
            return None
        if self.non_persistent_global_ckpt_dir is not None:
            return Path(self.non_persistent_global_ckpt_dir)
        base = self.save if self.save is not None else self.load
        return None if base is None else Path(base) / _NON_PERSISTENT_CKPT_SUBDIR

    def _check_values(self) -> None:
        for name in _PATHS:
            path = getattr(self, name)
            if path is not None and not (isinstance(path, str | os.PathLike) and os.fspath(path).strip()):
                raise ConfigError(f"{name} is {path!r}; it must be a path, or None where there is none")
            if path is not None and (meant := user_path(path)) != Path(path):
                object.__setattr__(self, name, meant)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                text = ", ".join(map(str, known))
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be one of {text}")
        if self.ckpt_format != SAFETENSORS:
            raise ConfigError(
                f"ckpt_format is {self.ckpt_format!r}; it must be safetensors, in which models of FSDP2 are "
                "saved, too. Directories of torch DCP are written by save_fsdp_dtensor_checkpoint; weights "
                "out of them can be had as pretrained_checkpoint"
            )
        for field in fields(self):
            if field.type == "bool" and type(getattr(self, field.name)) is not bool:
                raise ConfigError(f"{field.name} is {getattr(self, field.name)!r}; it must be True or False")

    def _check_counts(self) -> None:
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"{name} is {value!r}; it must be {least} or more, or None")
        if type(self.most_recent_k) is not int or (self.most_recent_k < 1 and self.most_recent_k != -1):
            raise ConfigError(f"most_recent_k is {self.most_recent_k!r}; it must be 1 or more, or -1 for all")
        for name in ("non_persistent_recent_k", "storage_writers_per_rank"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be 1 or more")

    def _check_needs(self) -> None:
        if self.ckpt_step is not None and self.load is None:
            raise ConfigError("ckpt_step says what to resume, but load is not set: set load")
        for name in ("fall_back", "exit_on_missing_checkpoint"):
            if getattr(self, name) and self.load is None:
                raise ConfigError(f"{name} says how to resume, but load is not set: set load")
        if self.finetune and self.load is None and self.pretrained_checkpoint is None:
            raise ConfigError("finetune needs weights: set load or pretrained_checkpoint")
        for name in ("save_interval", "save_first_step", "async_save", "also_save_hf_checkpoint"):
            if getattr(self, name) and self.save is None:
                raise ConfigError(f"{name} is set, but save is not: nothing would be saved")
        if self.non_persistent_save_interval is not None and self.non_persistent_ckpt_type is None:
            raise ConfigError(
                "non_persistent_save_interval is set, but non_persistent_ckpt_type is not: set it to global "
                "or local"
            )
        if self.non_persistent_ckpt_type == "local" and self.non_persistent_local_ckpt_dir is None:
            raise ConfigError("local checkpoints need a place: set non_persistent_local_ckpt_dir")
        if self.non_persistent_ckpt_type == "global" and self.non_persistent_directory is None:
            raise ConfigError("global short-lived checkpoints need a place: set save, or their directory")

    def _check_contradictions(self) -> None:
        if self.ckpt_step is not None and self.fall_back:
            raise ConfigError("ckpt_step asks for one step, fall_back for any that can be read: choose one")
        for name, kind in (("local", "local"), ("global", "global")):
            option = f"non_persistent_{name}_ckpt_dir"
            if getattr(self, option) is not None and self.non_persistent_ckpt_type != kind:
                raise ConfigError(
                    f"{option} is set, but non_persistent_ckpt_type is {self.non_persistent_ckpt_type!r}: "
                    "nothing would go there"
                )


def _same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
