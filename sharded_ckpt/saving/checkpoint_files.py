"""What makes weights a checkpoint that loads by itself: config, generation config, the files carried over."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from patchers.deci_x import BlockConfigs
from patchers.descriptor import ModelDescriptor
from patchers.dialects import Dialect, decoder_fields
from patchers.errors import ConfigError, FamilyError, MissingKeysError, ShardedCkptError
from patchers.families import NATIVE_FAMILY, PLAIN_FAMILIES
from patchers.inference import infer_block_configs
from patchers.names import block_of, fold, fold_indices
from patchers.native import model_class_of
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.checkpoint.local import LocalSource
from sharded_ckpt.checkpoint.publish import Transaction
from sharded_ckpt.checkpoint.source import TensorSource, open_source, read_config
from sharded_ckpt.config import native_config
from sharded_ckpt.saving.built_blocks import check_built
from sharded_ckpt.saving.carried_files import GENERATION_CONFIG, carry_files
from sharded_ckpt.saving.saved_config import (
    Origin,
    Said,
    blocks_asked,
    check_blocks,
    config_json,
    silent_warning,
)
from sharded_ckpt.saving.saved_tensors import unwrapped
from sharded_ckpt.saving.shared_tensors import Shares
from sharded_ckpt.ties import ties_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a rank was asked to save as a checkpoint. See `save_sharded_checkpoint`."""

    model: PreTrainedModel | None
    config: PreTrainedConfig
    block_configs: BlockConfigs | Literal["infer"] | None
    dialect: Dialect | None
    source: str | os.PathLike[str] | None

    @classmethod
    def of(
        cls,
        model_shard: Any,
        config: PreTrainedConfig | None,
        block_configs: BlockConfigs | Literal["infer"] | None,
        dialect: Dialect | str | None,
        source: str | os.PathLike[str] | None,
    ) -> Request:
        """Check the arguments of one rank.

        Raises:
            ConfigError: There is no config to save, or an argument is wrong.
        """
        model = unwrapped(model_shard) if isinstance(model_shard, nn.Module) else None
        if model is not None and not isinstance(model, PreTrainedModel):
            raise ConfigError(
                f"a {type(model).__name__} is no transformers model and has no config of one; pass such a "
                "model, or a dict of tensors with config=…, or save the weights alone with save_sharded_model"
            )
        config = config if config is not None or model is None else model.config
        if not isinstance(config, PreTrainedConfig):
            raise ConfigError(
                "the checkpoint needs a config: pass config=… with a dict of tensors (a transformers config, "
                f"such as load_model_config gives), found {type(config).__name__}"
            )
        if isinstance(block_configs, str) and block_configs != "infer":
            raise ConfigError(f"block_configs is a list of blocks, or 'infer', not {block_configs!r}")
        return cls(model, config, block_configs, None if dialect is None else Dialect(dialect), source)

    @property
    def model_class(self) -> type | None:
        """The class of the model; of a dict the native one, None if transformers has none."""
        if self.model is not None:
            return type(self.model)
        with suppress(FamilyError):
            return model_class_of(self.config)
        return None

    @property
    def architecture(self) -> str | None:
        """The name of the class, as config.json says it."""
        return None if self.model_class is None else self.model_class.__name__.removeprefix("FSDP")

    @property
    def ties(self) -> dict[str, str]:
        """Which name is tied to which."""
        return ties_of(self.config, self.model_class, self.model)

    def check_built(self) -> None:
        """Make sure that the config builds the blocks of this rank's model.

        Raises:
            BlockConfigError: It builds others.
        """
        if self.model is not None and self.block_configs != "infer":
            check_built(self.model, self.config, self.block_configs)

    def agree(self, control: Coordinator) -> None:
        """Make sure that all ranks were asked for the same.

        Raises:
            ConfigError: A field of the config, or an argument, differs between ranks.
        """
        doing = "comparing the configs of the ranks"
        said = control.gather(self._digests(), doing)
        with together(control, doing):
            for name in sorted({name for digests in said for name in digests}):
                ranks: dict[str | None, list[int]] = {}
                for rank, digests in enumerate(said):
                    ranks.setdefault(digests.get(name), []).append(rank)
                if len(ranks) > 1:
                    groups = " and ".join(fold_indices(group) for group in ranks.values())
                    raise ConfigError(
                        f"the ranks disagree on `{name}` (ranks {groups}): change the config alike on all"
                    )

    def _digests(self) -> dict[str, str]:
        fields = {name: value for name, value in self.config.to_dict().items() if not name.startswith("_")}
        asked = {"block_configs": self.block_configs, "dialect": self.dialect, "source": self.source}
        fields.update({f"{name}=": value for name, value in asked.items()})
        return {name: _digest(value) for name, value in fields.items()}


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint beside its weights, ready to be written by one rank.

    Attributes:
        config: The content of config.json.
        generation_config: The text of generation_config.json, if the model has one.
        source: Where the other small files come from, if anywhere.
        warning: What is to be told of the checkpoint once it is there.
    """

    config: Mapping[str, Any]
    generation_config: str | None
    source: TensorSource | None
    warning: str | None

    @classmethod
    def of(cls, request: Request, shares: Shares, *, untied: bool, target: Path) -> CheckpointFiles:
        """Decide on their content, and check that it fits the tensors; nothing is written yet.

        Raises:
            BlockConfigError: The config does not describe the tensors, or the dialect cannot say a block.
            CheckpointError: The source was named, and is not a checkpoint.
        """
        source = _open_source(request)
        shapes = {name: shape for name, (_, shape) in shares.tensors.items()}
        blocks = None
        if request.block_configs == "infer":
            blocks = infer_block_configs(shapes, decoder_fields(request.config.to_dict()))
        elif request.block_configs is not None:
            blocks = blocks_asked(request.config, request.block_configs)
        said = Said(
            architecture=request.architecture,
            dtype=shares.dtype,
            untied=untied,
            blocks=blocks,
            dialect=request.dialect,
        )
        raw = config_json(request.config, said, _origin(source, request.config))
        check_blocks(raw, shapes)
        _check_ends(request, shapes)
        model, generation = request.model, None
        if model is not None and model.can_generate() and model.generation_config is not None:
            generation = model.generation_config.to_json_string(keys_to_pop=["compile_config"])
        carried = None if source is None or _is_at(source, target) else source
        return cls(raw, generation, carried, silent_warning(raw, target))

    def write(self, save: Transaction, folder: str = "") -> None:
        """Put them into a save, in a folder of it (which ends in `/`)."""
        save.write_json(f"{folder}config.json", self.config)
        if self.generation_config is not None:
            save.write_bytes(f"{folder}{GENERATION_CONFIG}", self.generation_config.encode())
        if self.source is not None:
            but = [GENERATION_CONFIG] if self.generation_config else []
            carry_files(save, self.source, but=but, folder=folder)


def _open_source(request: Request) -> TensorSource | None:
    """Open the checkpoint that small files come from; None if the model comes from nowhere."""
    if request.source is not None:
        return open_source(request.source)
    report = getattr(request.model, "load_report", None)
    locations = getattr(report, "directory", None), getattr(report, "location", None)
    location = next(filter(None, (*locations, request.config.name_or_path)), None)
    if not location:
        return None
    try:
        return open_source(location, revision=getattr(report, "revision", None))
    except (ShardedCkptError, OSError) as error:
        logger.warning(
            "the tokenizer and other small files of %s are not carried over: %s; pass source=…",
            location,
            error,
        )
        return None


def _origin(source: TensorSource | None, config: PreTrainedConfig) -> Origin | None:
    """Return the config that the model's was translated from, if the source has such a one."""
    if source is None or not source.exists("config.json"):
        return None
    raw = read_config(source)
    if NATIVE_FAMILY.get(str(raw.get("model_type"))) != config.model_type:
        return None
    return Origin(raw, native_config(raw, source))


def _check_ends(request: Request, names: Collection[str]) -> None:
    """Make sure that a dict has what is outside of the blocks; of a module, its stubs tell what is not there.

    Raises:
        MissingKeysError: Embedding, final norm or head are missing.
    """
    if request.model is not None or request.config.model_type not in PLAIN_FAMILIES:
        return
    descriptor = ModelDescriptor.from_config(request.config)
    ends = [end for end in (descriptor.embedding, descriptor.final_norm, descriptor.head) if end]
    found = {name for name in names if block_of(name) is None}
    missing = [end for end in ends if not any(_is_in(name, end) for name in found)]
    fed = {end for pair in request.ties.items() if found & {*pair} for end in pair}
    if lost := [end for end in missing if not any(name.startswith(f"{end}.") for name in fed)]:
        raise MissingKeysError(f"there is no tensor of {fold(lost)}: the checkpoint would not be whole")


def _is_in(name: str, module: str) -> bool:
    """Whether a tensor belongs to a module; dicts of the backbone alone lack its prefix."""
    return name.startswith((f"{module}.", f"{module.partition('.')[2] or module}."))


def _is_at(source: TensorSource, target: Path) -> bool:
    """Whether a source is the directory that is saved to, whose files stay there by themselves."""
    if not isinstance(source, LocalSource) or not target.exists():
        return False
    return os.path.samefile(source.directory, target)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
