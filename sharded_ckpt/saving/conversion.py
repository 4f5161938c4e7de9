"""A checkpoint written anew: in another dialect, dtype, or number of files. No model is built."""

from __future__ import annotations

import logging
import os
import re
from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from patchers.base_sizes import BaseSizes
from patchers.block_config import BlockConfig
from patchers.dialects import Dialect, read_block_configs
from patchers.errors import ConfigError
from patchers.families import NATIVE_FAMILY
from sharded_ckpt.checkpoint.index import SINGLE_FILE
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.checkpoint.reader import open_checkpoint
from sharded_ckpt.checkpoint.source import TensorSource, read_config
from sharded_ckpt.saving.carried_files import READABLE_AS_DECILM, carry_files, config_saying

if TYPE_CHECKING:
    import torch

    from sharded_ckpt.checkpoint.writer import LazyTensor

logger = logging.getLogger(__name__)

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""What weights can be cast to."""

_DTYPE_FIELDS = ("dtype", "torch_dtype")
_NESTED = ("text_config", "vision_config", "audio_config")
_NUMBER = re.compile(r"(\d+)")


def convert_checkpoint(
    checkpoint: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dialect: Dialect | str | None = None,
    dtype: str | None = None,
    shards: int | None = None,
    max_shard_size: int | str | None = None,
    single_file: bool = False,
    manifest: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint anew; nothing but what is asked for changes.

    Tensors go from file to file, one after the other in the order of the blocks; those that are not cast stay
    bit for bit. Tokenizer and other small files are carried over as by `save_sharded_checkpoint`.

    Args:
        checkpoint: A directory, a file in it, a hub id, or a URL.
        target: The new directory.
        dialect: In which config.json is to say the blocks. A `nemotron-nas` config becomes that of its native
            family where the dialect asks for it.
        dtype: One of `DTYPES`, to cast tensors of these dtypes to; integers and quantised ones stay.
        shards: Number of files, about even in bytes.
        max_shard_size: Bytes of tensors in one file, or a text such as `"5GB"`.
        single_file: Whether to write one `model.safetensors`, without an index. Without this and the two
            above, all goes into one shard with an index.
        manifest: Whether to write `manifest.json`, with the size and SHA-256 of each file.
        overwrite: Whether the target may hold something already.

    Raises:
        ConfigError: Arguments exclude each other, or quantised weights were to be cast.
        BlockConfigError: The dialect cannot say a block; the message names block and field.
        CheckpointError: The checkpoint cannot be read, or there is something at the target.
    """
    if sum([shards is not None, max_shard_size is not None, single_file]) > 1:
        raise ConfigError("shards, max_shard_size and single_file exclude each other; give one of them")
    if shards is not None and not (isinstance(shards, int) and shards > 0):
        raise ConfigError(f"shards is {shards!r}; it must be a number of files, at least 1")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    reader = open_checkpoint(checkpoint, lambda index: index)
    config = _config(reader.source, None if dialect is None else Dialect(dialect), dtype)
    sizes = {key: entry.nbytes for key, entry in reader.headers().items()}
    order = sorted(sizes, key=_natural)
    tensors = _cast(reader.read(order), dtype)
    with transaction(target, manifest=manifest, overwrite=overwrite) as save:
        if single_file:
            save.write_file(SINGLE_FILE, {key: tensors[key] for key in order})
        else:
            for keys in _runs(order, sizes, shards):
                save.write_tensors({key: tensors[key] for key in keys}, max_shard_size=max_shard_size)
        if config is not None:
            save.write_json("config.json", config)
        carry_files(save, reader.source)
    reader.close()
    if dialect is not None and config is not None:
        _warn(config, target)


def _warn(config: Mapping[str, Any], target: str | os.PathLike[str]) -> None:
    from sharded_ckpt.saving.saved_config import silent_warning

    if text := silent_warning(config, target):
        logger.warning("%s", text)


def _config(source: TensorSource, dialect: Dialect | None, dtype: str | None) -> dict[str, Any] | None:
    if not source.exists("config.json"):
        if dialect is not None:
            raise ConfigError(f"{source.location} has no config.json that could say its blocks")
        return None
    raw: dict[str, Any] = read_config(source)
    if dtype is not None and raw.get("quantization_config"):
        raise ConfigError(
            f"the config of {source.location} says that its weights are quantised: they cannot be cast; "
            "load_and_shard_model dequantises, and save_sharded_checkpoint saves the result"
        )
    raw = raw if dialect is None else _in_dialect(raw, dialect, source)
    return raw if dtype is None else _of_dtype(raw, dtype)


def _in_dialect(raw: Mapping[str, Any], dialect: Dialect, source: TensorSource) -> dict[str, Any]:
    if raw.get("model_type") in NATIVE_FAMILY and dialect not in READABLE_AS_DECILM:
        from sharded_ckpt.config import native_config
        from sharded_ckpt.saving.saved_config import Said, config_json

        return config_json(native_config(raw, source), Said(dialect=dialect))
    told = read_block_configs(raw)
    blocks = told[0] if told else [BlockConfig()] * BaseSizes.of(raw).num_hidden_layers
    return config_saying(raw, blocks, dialect)


def _of_dtype(raw: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Say a dtype wherever the config says one, in configs nested in it too, and at the top in any case."""
    nested = {name: value for name, value in raw.items() if name in _NESTED and isinstance(value, dict)}
    said = {name: _of_dtype(value, dtype) for name, value in nested.items()}
    fields = [field for field in _DTYPE_FIELDS if field in raw] or ["dtype"]
    return {**raw, **said, **dict.fromkeys(fields, dtype)}


def _cast(tensors: Mapping[str, torch.Tensor], dtype: str | None) -> Mapping[str, torch.Tensor | LazyTensor]:
    """Return tensors that are cast one by one when they are written."""
    if dtype is None:
        return tensors
    import torch

    from sharded_ckpt.checkpoint.tensors import Casting
    from sharded_ckpt.checkpoint.writer import LazyTensor

    casting = Casting(getattr(torch, dtype))

    def lazily(key: str, tensor: torch.Tensor) -> torch.Tensor | LazyTensor:
        wanted = casting.target(key, tensor.dtype)
        if wanted == tensor.dtype:
            return tensor
        return LazyTensor(wanted, tuple(tensor.shape), lambda: tensor.to(wanted))

    return {key: lazily(key, tensor) for key, tensor in tensors.items()}


def _runs(keys: list[str], sizes: Mapping[str, int], shards: int | None) -> list[list[str]]:
    """Cut a row of tensors into as many files as asked for, about even in bytes, none empty."""
    if shards is None:
        return [keys]
    if shards > len(keys):
        raise ConfigError(f"{shards} shards are too many for {len(keys)} tensors")
    ends = list(accumulate(sizes[key] for key in keys))
    middles = [end - sizes[key] / 2 for end, key in zip(ends, keys, strict=True)]
    cuts = [0]
    for number in range(1, shards):
        cut = bisect_left(middles, ends[-1] * number / shards)
        cuts.append(max(cuts[-1] + 1, min(cut, len(keys) - (shards - number))))
    return [keys[begin:end] for begin, end in pairwise([*cuts, len(keys)])]


def _natural(key: str) -> list[tuple[int, str]]:
    """Order names with their numbers as numbers: block 2 stands before block 10."""
    parts = _NUMBER.split(key)
    return [(int(part), "") if at % 2 else (0, part) for at, part in enumerate(parts)]
