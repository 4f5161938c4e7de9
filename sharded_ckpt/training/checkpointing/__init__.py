"""Checkpoints of a training: when and where they are saved, what belongs to them, which one is loaded."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from sharded_ckpt.training.checkpointing.async_calls import AsyncCallsQueue as AsyncCallsQueue
    from sharded_ckpt.training.checkpointing.async_calls import AsyncRequest as AsyncRequest
    from sharded_ckpt.training.checkpointing.async_calls import (
        get_save_and_finalize_callbacks as get_save_and_finalize_callbacks,
    )
    from sharded_ckpt.training.checkpointing.async_calls import is_empty_async_queue as is_empty_async_queue
    from sharded_ckpt.training.checkpointing.async_calls import (
        maybe_finalize_async_save as maybe_finalize_async_save,
    )
    from sharded_ckpt.training.checkpointing.async_calls import schedule_async_save as schedule_async_save
    from sharded_ckpt.training.checkpointing.dataloader_state import (
        maybe_load_dataloader_state as maybe_load_dataloader_state,
    )
    from sharded_ckpt.training.checkpointing.dataloader_state import (
        maybe_save_dataloader_state as maybe_save_dataloader_state,
    )
    from sharded_ckpt.training.checkpointing.rng_state import get_rng_state as get_rng_state
    from sharded_ckpt.training.checkpointing.rng_state import set_rng_state as set_rng_state
    from sharded_ckpt.training.checkpointing.run_config import read_run_config as read_run_config
    from sharded_ckpt.training.checkpointing.tokenizer_assets import (
        save_tokenizer_assets as save_tokenizer_assets,
    )
    from sharded_ckpt.training.checkpointing.train_state import GlobalState as GlobalState
    from sharded_ckpt.training.checkpointing.train_state import TrainState as TrainState

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "dataloader_state": ("maybe_load_dataloader_state", "maybe_save_dataloader_state"),
        "run_config": ("read_run_config",),
        "tokenizer_assets": ("save_tokenizer_assets",),
        "async_calls": (
            "AsyncCallsQueue",
            "AsyncRequest",
            "get_save_and_finalize_callbacks",
            "is_empty_async_queue",
            "maybe_finalize_async_save",
            "schedule_async_save",
        ),
        "rng_state": ("get_rng_state", "set_rng_state"),
        "train_state": ("GlobalState", "TrainState"),
    },
)
