"""The state of training: models and optimizers in shards, what files call them, and how they get there."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from sharded_ckpt.training.adapter_files import load_adapter as load_adapter
    from sharded_ckpt.training.adapter_files import save_adapter as save_adapter
    from sharded_ckpt.training.audit import FillReport as FillReport
    from sharded_ckpt.training.audit import StrictHandling as StrictHandling
    from sharded_ckpt.training.checkpointing import AsyncCallsQueue as AsyncCallsQueue
    from sharded_ckpt.training.checkpointing import GlobalState as GlobalState
    from sharded_ckpt.training.checkpointing import TrainState as TrainState
    from sharded_ckpt.training.converters import AdapterKeys as AdapterKeys
    from sharded_ckpt.training.converters import DoRAKeys as DoRAKeys
    from sharded_ckpt.training.converters import DropExtraState as DropExtraState
    from sharded_ckpt.training.converters import GLUInterleave as GLUInterleave
    from sharded_ckpt.training.converters import PeftNames as PeftNames
    from sharded_ckpt.training.converters import PrefixKeys as PrefixKeys
    from sharded_ckpt.training.converters import SplitGateUp as SplitGateUp
    from sharded_ckpt.training.dcp import DcpWeights as DcpWeights
    from sharded_ckpt.training.dcp import SafeFileSystemReader as SafeFileSystemReader
    from sharded_ckpt.training.dcp import SafeLoadPlanner as SafeLoadPlanner
    from sharded_ckpt.training.dcp import read_dcp_metadata as read_dcp_metadata
    from sharded_ckpt.training.export import export_checkpoint as export_checkpoint
    from sharded_ckpt.training.load_spec import LoadSpec as LoadSpec
    from sharded_ckpt.training.load_spec import resolve_initial_load as resolve_initial_load
    from sharded_ckpt.training.merged import MergedAdapters as MergedAdapters
    from sharded_ckpt.training.model_state import ModelState as ModelState
    from sharded_ckpt.training.model_wrapper import ModelWrapper as ModelWrapper
    from sharded_ckpt.training.optimizer_state import OptimizerState as OptimizerState
    from sharded_ckpt.training.quantised import BlockQuantised as BlockQuantised
    from sharded_ckpt.training.quantised import MXFP4Quantised as MXFP4Quantised
    from sharded_ckpt.training.sources import load_sources as load_sources
    from sharded_ckpt.training.state_files import StagedState as StagedState
    from sharded_ckpt.training.state_files import save_training_state as save_training_state
    from sharded_ckpt.training.state_reading import StoredState as StoredState
    from sharded_ckpt.training.state_reading import load_training_state as load_training_state
    from sharded_ckpt.training.transforms import BaseStateDictAdapter as BaseStateDictAdapter
    from sharded_ckpt.training.transforms import StateDictConverter as StateDictConverter
    from sharded_ckpt.training.transforms import StateDictMode as StateDictMode
    from sharded_ckpt.training.transforms import StateDictTransforms as StateDictTransforms
    from sharded_ckpt.training.transforms import StorageConverter as StorageConverter

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "adapter_files": ("load_adapter", "save_adapter"),
        "dcp": ("DcpWeights", "SafeFileSystemReader", "SafeLoadPlanner", "read_dcp_metadata"),
        "export": ("export_checkpoint",),
        "load_spec": ("LoadSpec", "resolve_initial_load"),
        "merged": ("MergedAdapters",),
        "quantised": ("BlockQuantised", "MXFP4Quantised"),
        "sources": ("load_sources",),
        "audit": ("FillReport", "StrictHandling"),
        "checkpointing": ("AsyncCallsQueue", "GlobalState", "TrainState"),
        "converters": (
            "AdapterKeys",
            "DoRAKeys",
            "DropExtraState",
            "GLUInterleave",
            "PeftNames",
            "PrefixKeys",
            "SplitGateUp",
        ),
        "model_state": ("ModelState",),
        "model_wrapper": ("ModelWrapper",),
        "optimizer_state": ("OptimizerState",),
        "state_files": ("StagedState", "save_training_state"),
        "state_reading": ("StoredState", "load_training_state"),
        "transforms": (
            "BaseStateDictAdapter",
            "StateDictConverter",
            "StateDictMode",
            "StateDictTransforms",
            "StorageConverter",
        ),
    },
)
