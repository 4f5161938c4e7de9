"""Weights without the rest: for inference, and to start a training from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.runtime import as_runtime
from sharded_ckpt.training.audit import FillReport, StrictHandling
from sharded_ckpt.training.checkpointing.config import CheckpointConfig
from sharded_ckpt.training.checkpointing.layout import HF, SAFETENSORS, _get_checkpoint_format
from sharded_ckpt.training.checkpointing.resolution import resolve_together
from sharded_ckpt.training.checkpointing.retention import being_read
from sharded_ckpt.training.dcp import read_dcp_metadata
from sharded_ckpt.training.load_spec import LoadSpec, resolve_initial_load
from sharded_ckpt.training.model_state import ModelState
from sharded_ckpt.training.sources import load_sources, source_of
from sharded_ckpt.training.state_reading import load_training_state

if TYPE_CHECKING:
    from sharded_ckpt.runtime import Runtime
    from sharded_ckpt.training.transforms import StateDictTransforms

_SECTION: Final = "model."
"""How the names begin of a state dict that was saved as `{"model": …}`."""


def _load_model_weights_from_checkpoint(
    checkpoint_path: str,
    model: nn.Module | Sequence[nn.Module] | ModelState,
    fully_parallel_load: bool = False,
    return_state_dict: bool = False,
    dist_ckpt_strictness: str = "assume_ok_unexpected",
    strict: bool = True,
    *,
    runtime: Runtime | Any = None,
    transforms: StateDictTransforms | None = None,
) -> Any:
    """Fill a model from any checkpoint of its weights; each rank reads only what it owns. Collective.

    Args:
        checkpoint_path: A directory of checkpoints with a tracker, of one step, of torch DCP, or of Hugging
            Face.
        model: The model of this rank, or its parts.
        fully_parallel_load: Accepted for those who call it so: no rank ever reads for another.
        return_state_dict: Return the tensors that the model wants, by name, and leave the model as it is.
        dist_ckpt_strictness: What to do about names that one side lacks: see `StrictHandling`. Of the forms
            other than this library's own, weights must be complete, and no others.
        strict: If not, names that the checkpoint lacks are logged, and left as they are in the model.
        runtime: Where we are. By default torch.distributed says, or this is the only process.
        transforms: What turns tensors in files into those of the model.

    Returns:
        None; with `return_state_dict` the tensors; with a strictness that begins with `return` these, the
        names that the checkpoint lacks, and those that no rank wants.

    Raises:
        CheckpointNotFoundError: There is no such checkpoint.
        MissingKeysError: The model wants what is not there.
        CheckpointError: Something does not fit; nothing was loaded.
        CollectiveError: In place of these on all of several ranks.
    """
    where = as_runtime(runtime)
    with together(where.control, f"loading weights from {checkpoint_path}"):
        mode = StrictHandling.of(dist_ckpt_strictness if strict else StrictHandling.LOG_ALL)
        config = CheckpointConfig(pretrained_checkpoint=checkpoint_path)
        state = model if isinstance(model, ModelState) else ModelState(model)
    found = resolve_together(config, where.control)
    if found is None:
        raise CheckpointError(f"{checkpoint_path}: there is nothing to load")
    with ExitStack() as reading:
        with together(where.control, f"opening {found.directory}"):
            reading.enter_context(being_read(found.directory))
        spec = _spec_of(found.directory, state, where.control)
        if return_state_dict:
            with together(where.control, f"reading {found.directory}"):
                read = _read(spec, state, mode, transforms)
            return read
        report = load_weights(spec, state, mode, where, transforms)
    if mode in (StrictHandling.RETURN_UNEXPECTED, StrictHandling.RETURN_ALL):
        return None, set(report.missing), set(report.unexpected)
    return None


def load_weights(
    spec: LoadSpec,
    state: ModelState,
    strictness: StrictHandling,
    runtime: Runtime,
    transforms: StateDictTransforms | None = None,
) -> FillReport:
    """Fill a model from one source. Collective."""
    if spec.format == "training_state":
        return load_training_state(
            spec.checkpoint_id, state, runtime=runtime, transforms=transforms, strictness=strictness
        )
    return load_sources([spec], state, runtime=runtime, transforms=transforms)[0]


def _spec_of(directory: str, state: ModelState, control: Coordinator) -> LoadSpec:
    """Return what lies in a directory, as a source of weights. Collective."""
    names: set[str] = set()
    with together(control, f"looking at {directory}"):
        kind = _get_checkpoint_format(directory)
        if kind == HF:
            spec = resolve_initial_load(directory, from_hf=True)[0]
        elif kind == SAFETENSORS:
            spec = resolve_initial_load(directory)[0]
        else:
            spec = LoadSpec(directory, True, False, False, format="dcp")
            names = set(read_dcp_metadata(directory).state_dict_metadata)
    if kind in (HF, SAFETENSORS):
        return spec
    wanted = [name for place in state.places() for name in place.names]
    counts = [sum(prefix + name in names for name in wanted) for prefix in ("", _SECTION)]
    said = control.gather(counts, f"comparing names with those in {directory}")
    plain, in_section = (sum(count) for count in zip(*said, strict=True))
    return replace(spec, prefix=_SECTION if in_section > plain else "")


def _read(
    spec: LoadSpec, state: ModelState, mode: StrictHandling, transforms: StateDictTransforms | None
) -> Any:
    """Return the tensors that a model wants, without filling it."""
    source = source_of(spec)
    wanted = [name for place in state.places() for name in place.names]
    known = source.specs()
    read = source.read([name for name in wanted if name in known])
    tensors: Mapping[str, Any] = transforms.from_storage(read) if transforms else read
    if mode not in (StrictHandling.RETURN_UNEXPECTED, StrictHandling.RETURN_ALL):
        return dict(tensors)
    unexpected = set(known) - set(wanted) if mode.looks_at_unexpected else set()
    return dict(tensors), set(wanted) - set(known), unexpected
