"""Filling a model from several sources, base first: all of them are compared before the first is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from patchers.errors import CheckpointError, ConfigError, MissingKeysError
from patchers.names import fold
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.checkpoint.reader import open_checkpoint
from sharded_ckpt.checkpoint.source import open_source, read_config
from sharded_ckpt.loading.quantised import Coding
from sharded_ckpt.runtime import as_runtime
from sharded_ckpt.training.audit import FillReport, StrictHandling, audit_keys
from sharded_ckpt.training.dcp import DcpWeights
from sharded_ckpt.training.load_spec import LoadSpec
from sharded_ckpt.training.model_state import ModelState
from sharded_ckpt.training.quantised import BlockQuantised, MXFP4Quantised
from sharded_ckpt.training.state_reading import StoredState
from sharded_ckpt.training.transforms import StateDict, StateDictTransforms
from sharded_ckpt.training.weights import FileForm, SafetensorsWeights, Weights, WeightSource

if TYPE_CHECKING:
    from sharded_ckpt.runtime import Runtime


def load_sources(
    specs: Sequence[LoadSpec],
    model: ModelState | nn.Module,
    *,
    runtime: Runtime | Any = None,
    transforms: StateDictTransforms | None = None,
) -> tuple[FillReport, ...]:
    """Fill the weights of all ranks from several sources; of what two of them have, the later one's is taken.

    Collective. Together the sources must have all that the model wants; one that is not declared partial must
    have all by itself, unless it is the base of others. None may have what no rank wants. If anything does
    not fit, nothing was loaded.

    Args:
        specs: What `resolve_initial_load` gave, the same on all ranks. Optimizer state is not read here: that
            of a training state is `load_training_state`'s.
        model: A `ModelState`, or a model to make one of.
        runtime: Where we are. By default torch.distributed says, or this is the only process.
        transforms: Of training states and of Hugging Face's names.

    Returns:
        What each source gave on this rank.

    Raises:
        MissingKeysError: There is nothing for some tensors of the model.
        CheckpointError: A source has what no rank wants, not one thing that any wants, or does not fit.
        CollectiveError: In place of these on all ranks, when only some of several found it.
    """
    control = as_runtime(runtime).control
    with together(control, "opening what a training starts from"):
        state = model if isinstance(model, ModelState) else ModelState(model)
        sources = [Weights(source_of(spec), state, _form(spec, transforms)) for spec in specs]
        for source in sources:
            source.compare()
    missing = [_audited(source, control) for source in sources]
    _refuse_uncovered(specs, missing)
    with together(control, "loading what a training starts from"):
        return tuple(FillReport(source.fill(), cast=source.plan.cast) for source in sources)


def _audited(source: Weights, control: Coordinator) -> tuple[str, ...]:
    """Return what a source lacks, over all ranks; raise if it has what no rank wants."""
    missing, unexpected = audit_keys(
        source.plan, source.found, StrictHandling.RETURN_ALL, control, source.where
    )
    if unexpected:
        raise CheckpointError(
            f"{source.where}: has {fold(unexpected)}, which no rank wants. Are its names those of another "
            "form of the model? Nothing was loaded"
        )
    return missing


def _refuse_uncovered(specs: Sequence[LoadSpec], missing: Sequence[tuple[str, ...]]) -> None:
    for spec, names in list(zip(specs, missing, strict=True))[1:]:
        if names and not spec.partial:
            raise MissingKeysError(
                f"{spec.checkpoint_id} lacks {fold(names)}, and was not declared partial; nothing was loaded"
            )
    nowhere = set.intersection(*map(set, missing)) if missing else set()
    if nowhere:
        raise MissingKeysError(
            f"none of {', '.join(spec.checkpoint_id for spec in specs)} has {fold(nowhere)}; nothing was "
            "loaded"
        )


def source_of(spec: LoadSpec) -> WeightSource:
    """Return what reads the weights of a source.

    Raises:
        CheckpointError: It is broken, or not there.
    """
    if spec.format == "dcp":
        return DcpWeights(spec.checkpoint_id, spec.prefix)
    if spec.format == "training_state":
        return SafetensorsWeights(StoredState.open(spec.checkpoint_id).model, spec.checkpoint_id)
    return SafetensorsWeights(open_checkpoint(os.fspath(spec.checkpoint_id)))


def _form(spec: LoadSpec, transforms: StateDictTransforms | None) -> FileForm | None:
    if spec.format == "training_state":
        return None if transforms is None else FileForm(transforms.to_storage, transforms.from_storage)
    if spec.from_quantized and spec.format != "hf":
        raise ConfigError(f"{spec.checkpoint_id}: only checkpoints of Hugging Face are read as quantised")
    adapter = None if transforms is None else transforms.sd_adapter
    blocks = _dequantising(spec) if spec.from_quantized else None
    if not spec.from_hf or (adapter is None and blocks is None):
        return None

    def to_files(state: Any) -> StateDict:
        named = adapter.to_hf(state) if adapter else dict(state)
        return blocks.to_hf(named) if blocks else named

    def to_memory(state: Any) -> StateDict:
        plain = blocks.from_hf(state) if blocks else dict(state)
        return adapter.from_hf(plain) if adapter else plain

    return FileForm(to_files, to_memory)


def _dequantising(spec: LoadSpec) -> BlockQuantised | MXFP4Quantised:
    """Return what reads weights as their checkpoint says; if it says nothing, fp8 in the usual blocks."""
    source = open_source(spec.checkpoint_id)
    config = read_config(source) if source.exists("config.json") else {}
    coding = Coding.of(config.get("quantization_config"))
    if coding is None:
        return BlockQuantised()
    return MXFP4Quantised() if coding.method == "mxfp4" else BlockQuantised(coding.block)
