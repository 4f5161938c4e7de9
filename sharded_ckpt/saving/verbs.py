"""From shards in memory to a checkpoint on disk: every rank writes its own tensors, and all succeed or none.

Nothing is gathered: a rank's files are written straight from its memory, and rank 0 adds one index. Which
rank writes a tensor that several have is agreed upon before anything is written.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patchers.errors import ConfigError
from sharded_ckpt.checkpoint.coordinator import together
from sharded_ckpt.checkpoint.local import user_path
from sharded_ckpt.checkpoint.publish import transaction

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

    from patchers.deci_x import BlockConfigs
    from patchers.dialects import Dialect
    from sharded_ckpt.runtime import Runtime

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_NUMBERED = re.compile(r"-\d+-of-\d+$")


def save_sharded_model(
    model_shard: nn.Module | Mapping[str, torch.Tensor],
    out_path: str | os.PathLike[str],
    *,
    runtime: Runtime | Any = None,
    max_shard_size: int | str | None = None,
    durable: bool = True,
    manifest: bool = False,
    overwrite: bool = True,
) -> None:
    """Save the weights that the ranks hold as one checkpoint: shards and an index, but no config.

    Collective: all ranks call it, each with what it has. The files are `model-0000r-of-0000n.safetensors`,
    numbered over the ranks that have something to write, and `model.safetensors.index.json`, also when there
    is one rank; a single file and shards of an earlier save go away in the same step. Until all ranks are
    through, and if any of them fails, the directory stays as it was.

    Args:
        model_shard: A module, of which parameters and persistent buffers are saved; or a dict of tensors by
            name, saved as it is. What several ranks have must be equal, and is written once. All modules
            together must be a whole model; dicts may be any part of one.
        out_path: `<directory>/model.safetensors`. The directory is made if there is none.
        runtime: Where we are. By default torch.distributed says, or this is the only process.
        max_shard_size: Bytes of tensors in one file, or a text such as `"5GB"`. By default each rank writes
            one file.
        durable: Whether the checkpoint must survive a power cut once this returns.
        manifest: Whether to write `manifest.json`, with the size and SHA-256 of each file.
        overwrite: Whether the directory may hold something already.

    Raises:
        ConfigError: An argument is wrong; the text says what to pass.
        CheckpointError: A tensor has no values, or ranks have different tensors of one name.
        MissingKeysError: No rank owns some part of the model.
        OSError: The file system failed.
        CollectiveError: In place of these on all ranks, when some of several failed.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sharded_model({"weight": torch.zeros(2, 3)}, f"{folder}/ckpt/model.safetensors")
        ...     sorted(os.listdir(f"{folder}/ckpt"))
        ['model-00001-of-00001.safetensors', 'model.safetensors.index.json']
    """
    from sharded_ckpt.runtime import as_runtime
    from sharded_ckpt.saving.prepared import untied_text
    from sharded_ckpt.saving.saved_tensors import SavedTensors, in_files

    control = as_runtime(runtime).control
    with together(control, f"preparing to save {out_path}"):
        directory, stem = _directory_and_stem(out_path)
        mine = SavedTensors.of(model_shard)
    _, division = mine.divide(control, out_path)
    plan = {"stem": stem, "max_shard_size": max_shard_size}
    with transaction(
        directory, control, durable=durable, manifest=manifest, overwrite=overwrite, plan=plan
    ) as save:
        own = mine.written_by(control.rank, division)
        save.write_tensors(in_files(model_shard, own), stem, max_shard_size=max_shard_size)
    if division.untied and control.rank == 0:
        logger.warning(
            "%s: %s; the config.json beside them should say tie_word_embeddings: false, as "
            "save_sharded_checkpoint writes it",
            *(out_path, untied_text(division)),
        )


def save_sharded_checkpoint(
    model_shard: nn.Module | Mapping[str, torch.Tensor],
    checkpoint_dir: str | os.PathLike[str],
    *,
    runtime: Runtime | Any = None,
    config: PreTrainedConfig | None = None,
    block_configs: BlockConfigs | Literal["infer"] | None = None,
    dialect: Dialect | str | None = None,
    source: str | os.PathLike[str] | None = None,
    max_shard_size: int | str | None = None,
    durable: bool = True,
    manifest: bool = False,
    overwrite: bool = True,
) -> None:
    """Save the model that the ranks hold as a complete checkpoint directory, which loads by itself.

    Like `save_sharded_model`, with a config.json in the dialect that the model's config came in, the
    generation config, and the tokenizer and remote-code files of the checkpoint that the model was loaded
    from. What the config says of the blocks is compared with the tensors before anything is written; the
    live config is never changed.

    Args:
        model_shard: A transformers model, whole or cut down to the blocks of this rank; or a dict of tensors,
            with `config`.
        checkpoint_dir: The directory; it is made if there is none.
        runtime: Where we are. By default torch.distributed says, or this is the only process.
        config: In place of the model's own; of a dict it must be given.
        block_configs: One entry a block, in place of what the config says. `"infer"` reads them off the
            shapes of the tensors: for a model whose parts were exchanged in memory.
        dialect: The notation in which config.json says the blocks; by default the one they came in, and
            AnyModel for those that come from nowhere. See docs/dialects.md.
        source: The checkpoint (directory, hub id, URL) from which the small files are carried over. By
            default the one that the model was loaded from.
        max_shard_size: Bytes of tensors in one file, or a text such as `"5GB"`. By default each rank writes
            one file.
        durable: Whether the checkpoint must survive a power cut once this returns.
        manifest: Whether to write `manifest.json`, with the size and SHA-256 of each file.
        overwrite: Whether the directory may hold something already.

    Raises:
        ConfigError: An argument is wrong; the text says what to pass.
        BlockConfigError: The config does not describe the tensors, or the dialect cannot say a block.
        CheckpointError: A tensor has no values, or ranks have different tensors of one name.
        MissingKeysError: No rank owns some part of the model.
        OSError: The file system failed.
        CollectiveError: In place of these on all ranks, when some of several failed.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sharded_checkpoint(model, f"{folder}/ckpt")
        ...     [name for name in sorted(os.listdir(f"{folder}/ckpt")) if name.endswith("config.json")]
        ['config.json', 'generation_config.json']
    """
    from sharded_ckpt.runtime import as_runtime
    from sharded_ckpt.saving.prepared import PreparedCheckpoint
    from sharded_ckpt.saving.saved_tensors import in_files

    control = as_runtime(runtime).control
    with together(control, f"preparing to save to {checkpoint_dir}"):
        directory = _directory(checkpoint_dir)
    prepared = PreparedCheckpoint.gather(
        model_shard,
        directory,
        control,
        config=config,
        block_configs=block_configs,
        dialect=dialect,
        source=source,
    )
    plan = {"max_shard_size": max_shard_size}
    with transaction(
        directory, control, durable=durable, manifest=manifest, overwrite=overwrite, plan=plan
    ) as save:
        save.write_tensors(in_files(model_shard, prepared.tensors), max_shard_size=max_shard_size)
        prepared.write_files(save)
    prepared.warn()


def _directory_and_stem(out_path: Any) -> tuple[Path, str]:
    """Split what the user gave into the directory and the begin of the file names."""
    example = "pass <directory>/model.safetensors"
    if not isinstance(out_path, str | os.PathLike):
        raise ConfigError(f"out_path is a path, found {type(out_path).__name__}; {example}")
    path = user_path(out_path)
    if path.suffix != _SUFFIX or path.is_dir():
        found = "a directory" if path.is_dir() else f"a file that ends in {path.suffix!r}"
        raise ConfigError(
            f"{path}: expected the name of a {_SUFFIX} file, found {found}; {example}. "
            "save_sharded_checkpoint takes a directory"
        )
    if _NUMBERED.search(path.stem):
        raise ConfigError(f"{path}: shards get their numbers by themselves; {example}")
    return path.parent, path.stem


def _directory(checkpoint_dir: Any) -> Path:
    if not isinstance(checkpoint_dir, str | os.PathLike):
        raise ConfigError(f"checkpoint_dir is a path, found {type(checkpoint_dir).__name__}")
    path = user_path(checkpoint_dir)
    if path.suffix == _SUFFIX:
        raise ConfigError(
            f"{path}: expected a directory, found the name of a file; pass {path.parent}, or save the "
            "weights alone with save_sharded_model"
        )
    return path
