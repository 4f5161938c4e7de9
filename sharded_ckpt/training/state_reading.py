"""Training state out of files: opened, compared with what the ranks want, and only then filled in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from patchers.errors import CheckpointError, CheckpointNotFoundError
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.checkpoint.local import LocalSource
from sharded_ckpt.checkpoint.reader import CheckpointReader, open_checkpoint
from sharded_ckpt.checkpoint.source import INDEX_SUFFIX, read_json
from sharded_ckpt.runtime import as_runtime
from sharded_ckpt.training.audit import (
    FillPlan,
    FillReport,
    StrictHandling,
    audit_keys,
)
from sharded_ckpt.training.model_state import ModelState, refuse_unequal
from sharded_ckpt.training.optimized import Optimized, has_room
from sharded_ckpt.training.optimizer_state import OptimizerState
from sharded_ckpt.training.optimizer_table import OptimizerTable, state_key
from sharded_ckpt.training.schedulers import check_schedulers, fill_schedulers
from sharded_ckpt.training.state_files import (
    FORMAT,
    MODEL_STEM,
    OPTIM_STEM,
    OPTIMIZER_FILE,
    STATE_FILE,
    VERSION,
)
from sharded_ckpt.training.weights import FileForm, SafetensorsWeights, Weights

if TYPE_CHECKING:
    from sharded_ckpt.runtime import Runtime
    from sharded_ckpt.training.transforms import StateDictTransforms

_ATTEMPTS = 10
_SUFFIX = ".safetensors" + INDEX_SUFFIX


@dataclass(frozen=True)
class StoredState:
    """A training state in files, opened.

    Attributes:
        directory: Where it is.
        info: The content of training_state.json.
        model: Reads the weights.
        optim: Reads the tensors of the optimizers.
        table: What the optimizers keep besides.
    """

    directory: str
    info: Mapping[str, Any]
    model: CheckpointReader
    optim: CheckpointReader
    table: OptimizerTable

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> StoredState:
        """Open a training state; all of it is of one save, even if another save replaces it meanwhile.

        Raises:
            CheckpointNotFoundError: There is none.
            CheckpointError: It is broken, or of a newer version.
        """
        for _ in range(_ATTEMPTS):
            source = LocalSource(directory)
            try:
                stored = cls._open(source)
            except (CheckpointError, OSError):
                if not source.changed():
                    raise
                continue
            if not source.changed():
                return stored
        raise CheckpointError(f"{directory} is replaced faster than it can be opened; wait for its writer")

    @classmethod
    def _open(cls, source: LocalSource) -> StoredState:
        info = _info(source)
        table = OptimizerTable.from_plain(
            read_json(source, OPTIMIZER_FILE), f"{source.location}/{OPTIMIZER_FILE}"
        )
        model, optim = (open_checkpoint(source.directory / f"{s}{_SUFFIX}") for s in (MODEL_STEM, OPTIM_STEM))
        return cls(source.location, info, model, optim, table)


def load_training_state(
    directory: str | os.PathLike[str] | StoredState,
    model: ModelState | nn.Module,
    optimizer: OptimizerState | None = None,
    *,
    runtime: Runtime | Any = None,
    transforms: StateDictTransforms | None = None,
    strictness: StrictHandling | str = StrictHandling.RAISE_ALL,
) -> FillReport:
    """Fill the model and the optimizers of all ranks from what any number of ranks has saved.

    Collective: all ranks call it. What all of them want is compared with what there is before anything is
    touched; if something does not fit, all ranks raise the same error and nothing was loaded.

    Args:
        directory: What `save_training_state` has written; or that, opened.
        model: A `ModelState`, or a model to make one of.
        optimizer: None on ranks that train nothing. If it is None on all of them, the optimizer state is not
            read: to start with a fresh optimizer.
        runtime: Where we are. By default torch.distributed says, or this is the only process.
        transforms: Those that it was saved with.
        strictness: What to do about keys that one side lacks: see `StrictHandling`.

    Returns:
        What was filled on this rank, and what was missing, unexpected and cast.

    Raises:
        MissingKeysError: The model or an optimizer wants what is not there.
        CheckpointError: There is more than the ranks want, something of another shape, or a broken file.
        CollectiveError: In place of these on all ranks, when only some of several found it.

    Example:
        >>> import tempfile
        >>> from sharded_ckpt.training import save_training_state
        >>> model = nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_training_state(folder, model)
        ...     print(load_training_state(folder, nn.Linear(2, 2)))
        2 tensors filled
    """
    control = as_runtime(runtime).control
    opened = directory if isinstance(directory, StoredState) else None
    directory = directory.directory if isinstance(directory, StoredState) else directory
    with together(control, f"opening {directory}"):
        mode = StrictHandling.of(strictness)
        state = model if isinstance(model, ModelState) else ModelState(model)
        stored = opened or StoredState.open(directory)
    _refuse_another_save(stored, control)
    with together(control, f"comparing the model with {directory}"):
        form = None if transforms is None else FileForm(transforms.to_storage, transforms.from_storage)
        weights = Weights(SafetensorsWeights(stored.model, f"{directory}/model"), state, form)
        weights.compare()
    missing, unexpected = audit_keys(weights.plan, weights.found, mode, control, weights.where)
    slots = _compare_optimizers(stored, optimizer, transforms, mode, control)
    with together(control, f"loading {directory}"):
        filled = weights.fill()
        if optimizer is not None and slots is not None:
            optimizer.fill(slots, stored.table, _slot_tensors(stored, slots))
            if stored.table.scheduler is not None:
                fill_schedulers(optimizer.scheduler, stored.table.scheduler)
    return FillReport(filled, missing, unexpected, weights.plan.cast)


def _compare_optimizers(
    stored: StoredState,
    optimizer: OptimizerState | None,
    transforms: StateDictTransforms | None,
    mode: StrictHandling,
    control: Coordinator,
) -> dict[str, list[tuple[Optimized, str]]] | None:
    """Find out which key feeds which slot, on all ranks; None if no rank has an optimizer."""
    if not any(control.gather(optimizer is not None, "asking who has an optimizer")):
        return None
    slots: dict[str, list[tuple[Optimized, str]]] = {}
    with together(control, f"comparing the optimizers with {stored.directory}"):
        if (saved := stored.info["transforms"]) != (now := transforms.described if transforms else []):
            raise CheckpointError(
                f"{stored.directory}: saved with {saved or 'no storage converters'}, to be loaded with "
                f"{now or 'none'}: optimizer state has the form of memory, and the two would not fit "
                "together. Load with the same ones, or load the model alone"
            )
        if optimizer is not None:
            slots = optimizer.plan(stored.table, stored.optim.index.weight_map)
            check_schedulers(optimizer.scheduler, stored.table.scheduler)
        used = frozenset(slots).union(_refuse_unequal_slots(stored, slots))
    audit_keys(
        FillPlan(tuple(slots), used=used), stored.optim.index, mode, control, f"{stored.directory}/optim"
    )
    return slots


def _refuse_unequal_slots(stored: StoredState, slots: Mapping[str, list[tuple[Optimized, str]]]) -> set[str]:
    """Compare what stands for one slot of tied parameters; return these keys, under all of their names."""
    keys, where = stored.optim.index.keys(), f"{stored.directory}/optim"
    others: set[str] = set()
    groups = []
    for item, slot in (target for targets in slots.values() for target in targets):
        others |= {state_key(name, slot) for name in (*item.names, *item.partners)} & keys
        groups.append(tuple(key for name in item.names if (key := state_key(name, slot)) in keys))
    plan = FillPlan((), equal=tuple(group for group in groups if len(group) > 1))
    if plan.equal:
        refuse_unequal(plan, stored.optim.read([key for group in plan.equal for key in group]), where)
    return others


def _slot_tensors(
    stored: StoredState, slots: Mapping[str, list[tuple[Optimized, str]]]
) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of optimizers: streamed where there is room for them, else in memory of their own."""
    headers = stored.optim.headers(slots)
    described = stored.optim.read(slots, device="meta", read_ahead=False)
    streamed = [
        key
        for key in headers
        if all(has_room(item.state.get(slot), described[key]) for item, slot in slots[key])
    ]
    yield from stored.optim.iter_tensors(streamed)
    yield from stored.optim.read(headers.keys() - set(streamed), materialize=True).items()


def _info(source: LocalSource) -> dict[str, Any]:
    where = f"{source.location}/{STATE_FILE}"
    if not source.exists(STATE_FILE):
        found = ", ".join(sorted(os.listdir(source.directory))[:8]) or "nothing"
        raise CheckpointNotFoundError(
            f"{source.location}: no training state: expected {STATE_FILE}, found {found}. Weights alone are "
            "loaded with load_and_shard_model"
        )
    info = read_json(source, STATE_FILE)
    if not isinstance(info, dict) or info.get("format") != FORMAT or not isinstance(info.get("version"), int):
        raise CheckpointError(f"{where}: not the file of a training state")
    if info["version"] > VERSION:
        raise CheckpointError(f"{where}: version {info['version']}, but only {VERSION} is known here: update")
    return {"transforms": [], "id": None, **info}


def _refuse_another_save(stored: StoredState, control: Coordinator) -> None:
    said = control.gather(stored.info["id"], f"comparing what the ranks have opened as {stored.directory}")
    with together(control, f"comparing what the ranks have opened as {stored.directory}"):
        if len(set(said)) > 1:
            raise CheckpointError(
                f"{stored.directory}: the ranks see different saves there; all must see the same directory, "
                "and nobody may save into it while it is loaded"
            )
