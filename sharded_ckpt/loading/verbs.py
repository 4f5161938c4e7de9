"""From a checkpoint on disk (or on the hub) to a shard in memory.

torch and transformers are imported inside of the functions: the files are validated and read ahead while
those imports, which take seconds, are still to come.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from patchers.errors import ConfigError, MissingKeysError
from patchers.names import block_of, fold
from sharded_ckpt.checkpoint.coordinator import together
from sharded_ckpt.checkpoint.local import user_path
from sharded_ckpt.progress import byte_progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from patchers.deci_x import BlockConfigs
    from patchers.descriptor import ModelDescriptor
    from sharded_ckpt.runtime import Runtime

Route = Literal["auto", "direct", "converted"]
PathOrId = str | os.PathLike[str]


def load_and_shard_model(
    descriptor: ModelDescriptor | str,
    checkpoint_path: PathOrId,
    owned_block_indexes: Iterable[int] | Literal["auto"] = "auto",
    model_config: PreTrainedConfig | None = None,
    *,
    runtime: Runtime | Any = None,
    block_configs: BlockConfigs | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    strict: bool = True,
    materialize: bool = False,
    route: Route = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathOrId | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    progress: bool | Callable[[int], object] | None = None,
) -> PreTrainedModel:
    """Load the blocks that this rank owns of a (heterogeneous) checkpoint into the native class.

    Only the bytes of those blocks are read; on the CPU they are not even copied, but mapped. Ranks load
    together: if any of them fails, all raise the same error.

    Args:
        descriptor: A `ModelDescriptor`, the name of a family, or `"auto"`.
        checkpoint_path: A directory, a file in it, a hub id, or a URL.
        owned_block_indexes: The blocks of this rank. `"auto"` deals them out in contiguous runs such that the
            largest rank is as small as possible, in bytes.
        model_config: In place of the checkpoint's config.json.
        runtime: Where we are. By default torch.distributed says, or this is the only process.
        block_configs: One entry a block, in place of what the config says.
        dtype: To cast floating-point tensors to, `torch.bfloat16` or `"bfloat16"`. By default what the
            checkpoint says.
        device: Where the shard is to be; by default where the runtime is.
        strict: Whether tensors that the model does not want are an error. Missing ones always are.
        materialize: Copy everything into memory, instead of mapping the files: for training, for network file
            systems, and where others may change the files in place.
        route: `"direct"` or `"converted"` (through transformers' own loader); see
            `sharded_ckpt.loading.filling`.
        attn_implementation: As in `from_pretrained`.
        trust_remote_code: Whether code in the checkpoint may be run.
        revision: Of a hub id.
        token: For the hub.
        cache_dir: Where downloads are kept.
        local_files_only: Never reach for the network.
        allow_pickle: Whether weights may come out of `.bin` files where there is no safetensors; they are
            opened with `weights_only=True`.
        progress: Whether to show a bar of the bytes read; by default on the main rank of a terminal. Or a
            function that is told each number of bytes read.

    Returns:
        The native class in eval mode; `model.load_report` says what was done. Whole, it is a normal model. A
        partial shard raises when it is called or saved like a whole one.

    Raises:
        CheckpointError: The files are broken, or do not fit the model.
        MissingKeysError: Tensors that are needed are not there.
        ConfigError: The config, the block configs or an argument is wrong.
        ShardMemoryError: The blocks do not fit into the memory of this rank.
        CollectiveError: On all ranks, when some of several failed.

    Example:
        >>> shard = load_and_shard_model("auto", checkpoint, {0, 1})  # the path of a checkpoint
        >>> shard.load_report.blocks, len(list(shard.parameters()))
        ((0, 1), 19)
    """
    where = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    _check_order(descriptor, checkpoint_path)
    hint = _read_ahead(checkpoint_path, owned_block_indexes, where)
    from sharded_ckpt.loading.dealing import agree_on_blocks
    from sharded_ckpt.loading.opening import open_loader
    from sharded_ckpt.loading.options import LoadOptions
    from sharded_ckpt.loading.shortage import explained_shortage
    from sharded_ckpt.runtime import as_runtime

    options = LoadOptions(
        descriptor=descriptor,
        owned=owned_block_indexes,
        config=model_config,
        block_configs=block_configs,
        dtype=dtype,
        device=device,
        strict=strict,
        materialize=materialize,
        route=route,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        revision=revision,
        is_read_ahead=hint is not None,
    )
    here = as_runtime(runtime)
    with together(here.control, f"planning the load of {os.fspath(checkpoint_path)}"):
        loader = open_loader(checkpoint_path, {**where, "allow_pickle": allow_pickle}, options, here)
    agree_on_blocks(loader)
    lack = explained_shortage(loader.source.location, loader.nbytes, loader.device)
    with together(here.control, f"loading {os.fspath(checkpoint_path)}"), lack:
        with byte_progress(progress, loader.nbytes, here.is_main_process) as count:
            loader.fill(count)
        model = loader.finish()
    del hint  # the disk may stop reading ahead
    return model


def load_sharded_state_dict(
    model_name_or_path: PathOrId,
    keys_to_load: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    *,
    allow_missing: bool = False,
    dtype: torch.dtype | None = None,
    materialize: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathOrId | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> dict[str, torch.Tensor]:
    """Load tensors of a checkpoint by key.

    Only the shards that hold the keys are opened, and `n` keys cost O(n).

    Args:
        model_name_or_path: A directory, a file in it, a hub id, or a URL.
        keys_to_load: Any iterable of keys; None loads everything.
        device: Where the tensors are to be. On the CPU they are views of the mapped files.
        allow_missing: Whether keys that the checkpoint lacks may be left out of the result.
        dtype: To cast tensors of plain floating dtypes to; integers and quantised ones stay as they are.
        materialize: Copy into memory instead of mapping.
        revision: Of a hub id.
        token: For the hub.
        cache_dir: Where downloads are kept.
        local_files_only: Never reach for the network.
        allow_pickle: Whether tensors may come out of `.bin` files where there is no safetensors.

    Returns:
        The tensors by key.

    Raises:
        MissingKeysError: The checkpoint lacks keys, and `allow_missing` is off.
        CheckpointError: The files are broken.
        TypeError: `keys_to_load` is one string, or holds something else than strings.

    Example:
        >>> tensors = load_sharded_state_dict(checkpoint, ["lm_head.weight"])  # the path of a checkpoint
        >>> tensors["lm_head.weight"].shape
        torch.Size([128, 64])
    """
    if isinstance(keys_to_load, str):
        raise TypeError(f"keys_to_load is an iterable of keys, not one string: pass [{keys_to_load!r}]")
    from sharded_ckpt.loading.pickled import open_reader

    where = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    reader = open_reader(model_name_or_path, allow_pickle=allow_pickle, **where)
    wanted = list(reader.index.keys() if keys_to_load is None else dict.fromkeys(keys_to_load))
    if odd := [key for key in wanted if not isinstance(key, str)]:
        raise TypeError(f"keys_to_load has {odd[0]!r:.80}; keys are strings")
    present = [key for key in wanted if key in reader.index]
    if len(present) < len(wanted) and not allow_missing:
        missing = [key for key in wanted if key not in reader.index]
        raise MissingKeysError(
            f"{reader.index.location} has no tensors {fold(missing)}; pass allow_missing=True if they may be "
            "absent"
        )
    return reader.read(present, device=device, dtype=dtype, materialize=materialize)


def is_in_safetensors_format(checkpoint_dir: PathOrId) -> bool:
    """Whether a local directory holds safetensors weights: shards under an index, or a single file.

    Raises:
        ConfigError: It is a URL.

    Example:
        >>> import tempfile
        >>> is_in_safetensors_format(tempfile.gettempdir() + "/no/such/directory")
        False
    """
    folder = user_path(checkpoint_dir)
    return folder.is_dir() and any(
        entry.name.endswith((".safetensors", ".safetensors.index.json")) for entry in folder.iterdir()
    )


def _check_order(descriptor: object, checkpoint: PathOrId) -> None:
    """Refuse a checkpoint in the place of the descriptor, which comes first."""
    if not isinstance(descriptor, (str, os.PathLike)):
        return
    first, second = os.fspath(descriptor), os.fspath(checkpoint)
    if os.path.isdir(first) and not os.path.exists(second):
        raise ConfigError(
            f"the descriptor comes first, then the checkpoint: load_and_shard_model({second!r}, {first!r})"
        )


def _read_ahead(location: PathOrId, owned: Iterable[int] | str, where: Mapping[str, Any]) -> object:
    """Let the disk start on the blocks that were asked for, by a guess from their names that decides nothing.

    Whatever is wrong here is found again by the load itself, which can tell the other ranks.
    """
    from sharded_ckpt.checkpoint.reader import open_checkpoint

    if isinstance(owned, str) or not isinstance(owned, Collection):
        return None
    with suppress(Exception):
        reader = open_checkpoint(location, **where)
        return reader.prefetch([key for key in reader.index if block_of(key) in owned])
    return None
