"""State dicts in the format of torch DCP, for those who read them with it; tensors stay spread.

`save_checkpoint` does not need it: what FSDP2 has spread it saves as whole tensors, every rank its share.
DCP pickles what is no tensor: only plain data is let through, and nothing else is read back. One directory is
one save, whole or not there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.checkpoint.local import user_path
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.checkpoint.writer import DTYPE_NAMES
from sharded_ckpt.runtime import default_runtime
from sharded_ckpt.training.audit import StrictHandling, Wanted, audit_keys, plan_fill, spec_of
from sharded_ckpt.training.checkpointing.config import CheckpointConfig
from sharded_ckpt.training.checkpointing.contexts import CheckpointType
from sharded_ckpt.training.checkpointing.layout import RELEASE, iteration_name
from sharded_ckpt.training.checkpointing.state_dict import _is_model_section
from sharded_ckpt.training.dcp import METADATA_FILE, SafeFileSystemReader, SafeLoadPlanner, read_dcp_metadata
from sharded_ckpt.training.places import without_extra_state
from sharded_ckpt.training.plain import to_plain

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

    from sharded_ckpt.training.transforms import StateDictTransforms

RNG_SECTION: Final = "rng_state"


def preprocess_fsdp_dtensor_state_dict(
    cfg: Any, raw_state_dict: Mapping[str, Any], model: nn.Module | None
) -> dict[str, Any]:
    """Return a state dict in the form that it has in files. Tensors share memory where they can.

    Extra states go; models take the form that the storage converters of `cfg.transforms` give them
    (`SplitGateUp` splits gate and up projections); the random numbers, of which every rank has its own, get
    the rank into their name.

    Args:
        cfg: May have `transforms`.
        raw_state_dict: As `generate_state_dict` gives it. It is not changed.
        model: Accepted for those who call it so: the converters say what is changed.
    """
    transforms: StateDictTransforms | None = getattr(cfg, "transforms", None)
    state: dict[str, Any] = {}
    for key, section in raw_state_dict.items():
        if _is_model_section(key) and isinstance(section, Mapping):
            plain = without_extra_state(section)
            state[key] = transforms.to_storage(plain) if transforms else plain
        elif key == RNG_SECTION:
            state[key] = {f"rank_{_rank():05d}": dict(section)}
        else:
            state[key] = section
    return state


def save_fsdp_dtensor_checkpoint(
    checkpoint_path: str | Path,
    state_dict: Mapping[str, Any],
    *,
    cfg: Any,
    model: nn.Module | None,
    storage_writer: Any | None = None,
    barrier: bool = True,
) -> Metadata:
    """Save a state dict with torch DCP. Collective.

    Args:
        checkpoint_path: The directory; it appears, or is replaced, whole. With a storage writer of the
            caller's own it is that writer's matter.
        state_dict: Tensors, DTensors and plain data, in sections.
        cfg: As for `preprocess_fsdp_dtensor_state_dict`; `storage_writers_per_rank` is taken from it, too.
        model: As there.
        storage_writer: Where to write instead.
        barrier: Whether ranks wait for each other in the end, with a storage writer of the caller's own.

    Returns:
        What `torch.distributed.checkpoint.save` returns.

    Raises:
        ConfigError: Something is neither a tensor nor plain data; it could not be read without risk.
        CheckpointError: DCP failed on some rank; nothing was published.
        CollectiveError: In place of these on all of several ranks.
    """
    control = default_runtime().control
    with together(control, f"preparing to save to {checkpoint_path}"):
        state = preprocess_fsdp_dtensor_state_dict(cfg, state_dict, model)
        _refuse_unplain(state)
    if storage_writer is not None:
        metadata = dcp_save(state, storage_writer)
        if barrier and _is_distributed():
            dist.barrier()
        return metadata
    writers = getattr(cfg, "storage_writers_per_rank", 1)
    with transaction(checkpoint_path, control) as save:
        save.supersede("*.distcp", METADATA_FILE)
        return dcp_save(state, _create_fsdp_dtensor_storage_writer(str(save.path), writers))


def load_fsdp_dtensor_checkpoint(
    load_dir: str,
    ckpt_cfg: CheckpointConfig,
    rank0: bool,
    sharded_state_dict: dict[str, Any] | None,
    iteration: int | None,
    release: bool = False,
    checkpoint_path_override: str | None = None,
    checkpointing_context: dict[str, Any] | None = None,
    cfg: Any | None = None,
) -> tuple[dict[str, Any], str, bool, CheckpointType]:
    """Fill a state dict from a directory of torch DCP, on any number of ranks. Collective.

    Names, shapes and kinds of numbers are compared on all ranks before anything is filled.

    Args:
        load_dir: The directory of all checkpoints.
        ckpt_cfg: Its `dist_ckpt_strictness` says what to do about names that one side lacks.
        rank0: Load nothing, only say where the checkpoint is.
        sharded_state_dict: What is filled, in place: live tensors, and plain data that is replaced.
        iteration: The step.
        release: Take the weights that belong to no step.
        checkpoint_path_override: The directory of the step itself.
        checkpointing_context: Accepted for those who call it so.
        cfg: As for saving.

    Returns:
        The state dict, the directory, whether it is a release, and `CheckpointType.FSDP_DTENSOR`.

    Raises:
        ConfigError: There is nothing to fill, or no step is named.
        MissingKeysError: Something is wanted that is not there.
        CheckpointError: Something does not fit, or cannot be read without risk.
        CollectiveError: In place of these on all of several ranks.
    """
    if checkpoint_path_override is None and iteration is None and not release:
        raise ConfigError("which step is loaded? pass iteration, release=True or checkpoint_path_override")
    name = RELEASE if release or iteration is None else iteration_name(iteration)
    path = os.fspath(user_path(checkpoint_path_override or os.path.join(load_dir, name)))
    if rank0:
        return {}, path, release, CheckpointType.FSDP_DTENSOR
    if sharded_state_dict is None:
        raise ConfigError("sharded_state_dict is None: pass the state dict that is to be filled")
    control = default_runtime().control
    with together(control, f"preparing to load {path}"):
        mode = StrictHandling.of(ckpt_cfg.dist_ckpt_strictness)
        state = preprocess_fsdp_dtensor_state_dict(cfg, sharded_state_dict, None)
    _audit(state, path, mode, control)
    with together(control, f"loading {path}"):
        planner = SafeLoadPlanner(allow_partial_load=not mode.raises_on_missing)
        with _dcp_errors(f"{path} cannot be read"):
            dcp.load(
                state,
                storage_reader=SafeFileSystemReader(path),
                planner=planner,
                no_dist=not _is_distributed(),
            )
        _take_over(sharded_state_dict, state, cfg)
    return sharded_state_dict, path, release, CheckpointType.FSDP_DTENSOR


def dcp_save(state: dict[str, Any], storage_writer: Any) -> Metadata:
    """Save with torch DCP; its error, which is no ordinary one, becomes one.

    Raises:
        CheckpointError: DCP failed.
    """
    with _dcp_errors("torch DCP cannot save"):
        return dcp.save(state, storage_writer=storage_writer, no_dist=not _is_distributed())


def _create_fsdp_dtensor_storage_writer(checkpoint_path: str, thread_count: int = 1) -> dcp.FileSystemWriter:
    """Return what writes the files of a DCP checkpoint."""
    return dcp.FileSystemWriter(checkpoint_path, thread_count=thread_count)


@contextmanager
def _dcp_errors(doing: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():  # it warns that one process works alone, which is what is meant
            warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)", UserWarning)
            yield
    except dcp.CheckpointException as error:  # a BaseException, which nobody would catch
        causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
        raise CheckpointError(f"{doing}: {causes}") from error


def _audit(state: Mapping[str, Any], path: str, mode: StrictHandling, control: Coordinator) -> None:
    """Compare the tensors that are wanted with those that are there, over all ranks."""
    with together(control, f"comparing the state dict with {path}"):
        said = read_dcp_metadata(path).state_dict_metadata
        found = {
            key: (DTYPE_NAMES[str(one.properties.dtype)], tuple(one.size))
            for key, one in said.items()
            if isinstance(one, TensorStorageMetadata)
        }
        tensors = _tensors_in(state)
        plan = plan_fill(
            [Wanted((key,), (), spec_of(tensor)) for key, tensor in tensors.items()], found, path
        )
    audit_keys(plan, found, mode, control, path)


def _tensors_in(value: Any, path: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested sections, by the names that DCP gives them."""
    if isinstance(value, Tensor):
        return {path: value}
    items: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    return {n: t for k, v in items for n, t in _tensors_in(v, f"{path}.{k}" if path else str(k)).items()}


def _take_over(raw: dict[str, Any], state: Mapping[str, Any], cfg: Any) -> None:
    """Put into the caller's state dict what was read in the form of files."""
    transforms: StateDictTransforms | None = getattr(cfg, "transforms", None)
    for key, section in state.items():
        if key == RNG_SECTION:
            raw[key] = section[f"rank_{_rank():05d}"]
        elif _is_model_section(key) and transforms is not None:
            for name, tensor in transforms.from_storage(section).items():
                if tensor is not raw[key][name]:
                    with torch.no_grad():
                        raw[key][name].copy_(tensor)
        elif not isinstance(section, Tensor) and not _is_model_section(key):
            raw[key] = section


def _refuse_unplain(value: Any, path: str = "the state dict") -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_unplain(item, f"{path}[{key!r}]")
    elif not isinstance(value, Tensor):
        to_plain(value, path)


def _rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
