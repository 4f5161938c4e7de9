"""A training is saved: collected, written, published; then made the checkpoint that counts; then old ones go.

Saving in the foreground and in the background is one path. What ranks do together, they do on the main
thread; what is written is as it was when the save began. A checkpoint appears whole, and the tracker names it
only after that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt.checkpoint.coordinator import Coordinator, Solo, refuse_disagreement, together
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.checkpoint.storage import LocalStorage
from sharded_ckpt.checkpoint.transaction import Transaction
from sharded_ckpt.training.checkpointing.async_calls import (
    AsyncCallsQueue,
    AsyncRequest,
    maybe_finalize_async_save,
    schedule_async_save,
)
from sharded_ckpt.training.checkpointing.contexts import runtime_of
from sharded_ckpt.training.checkpointing.dataloader_state import dataloader_state_of
from sharded_ckpt.training.checkpointing.hf_export import HFExport
from sharded_ckpt.training.checkpointing.local import local_manager_of
from sharded_ckpt.training.checkpointing.retention import remove_old_checkpoints
from sharded_ckpt.training.checkpointing.saved_parts import saved_parts_of
from sharded_ckpt.training.checkpointing.small_files import (
    SmallFiles,
    digest_of,
    loader_files,
    small_files_of,
)
from sharded_ckpt.training.checkpointing.targets import SaveTarget
from sharded_ckpt.training.checkpointing.trackers import write_trackers
from sharded_ckpt.training.state_files import StagedState

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from sharded_ckpt.training.checkpointing.manager import CheckpointCallbacks
    from sharded_ckpt.training.checkpointing.train_state import GlobalState

logger = logging.getLogger(__name__)


def save_checkpoint(
    state: GlobalState,
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer | Sequence[Optimizer] | None,
    opt_param_scheduler: Any | None,
    num_floating_point_operations_so_far: float,
    checkpointing_context: dict[str, Any] | None = None,
    pipeline_rank: int | None = None,
    tensor_rank: int | None = None,
    non_persistent_ckpt: bool = False,
    train_data_iterator: Any | None = None,
    preprocess_common_state_dict_fn: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
    prebuilt_state_dict: Mapping[str, Any] | None = None,
    pg_collection: Any = None,
    callback_manager: CheckpointCallbacks | None = None,
    module_name: str | None = None,
    *,
    storage: LocalStorage | None = None,
) -> None:
    """Save a checkpoint of the step that `state.train_state` names.

    Collective: all ranks call it, each with its own part of the model. The directory of the step appears
    whole; then the tracker names it; then callbacks are told; then old checkpoints go. Whatever fails, on any
    rank, is raised on all of them, and what counted before still counts. With `async_save` this returns when
    the tensors have been copied; the rest is done by `maybe_finalize_async_save`, and an error comes out
    there or at the next save.

    Args:
        state: Config, step, tokenizer, and the queue of saves in flight, which is made if it is needed.
        model: The model of this rank, or its parts.
        optimizer: None on ranks that train nothing.
        opt_param_scheduler: The learning-rate scheduler, if there is one.
        num_floating_point_operations_so_far: Of the whole training; kept in the train state.
        checkpointing_context: What `init_checkpointing_context` gave, if there are local checkpoints.
        pipeline_rank: Only for the log.
        tensor_rank: Only for the log.
        non_persistent_ckpt: Save a short-lived checkpoint, where the config says.
        train_data_iterator: If it has a state, that is saved.
        preprocess_common_state_dict_fn: Changes what the ranks are compared by before anything is written: to
            leave out what may differ.
        prebuilt_state_dict: What `generate_state_dict` gave, to be saved in place of model and optimizer.
        pg_collection: The process group of the ranks that share the model; by default all ranks.
        callback_manager: Its `on_checkpoint_save` is told of the checkpoint once it counts.
        module_name: Sets apart the random numbers of one of several models.
        storage: The file system.

    Raises:
        ConfigError: There is no place to save to, or the ranks do not mean the same.
        CheckpointError: Ranks have different tensors of one name, or the checkpoint of the step is pinned.
        MissingKeysError: No rank owns some part of the model.
        OSError: The file system failed; the text says whether anything was published.
        CollectiveError: In place of these on all of several ranks.
    """
    config = state.checkpoint_config
    maybe_finalize_async_save(state, config, blocking=True)
    runtime = runtime_of(state, pg_collection)
    control = runtime.control
    with together(control, "preparing to save a checkpoint"):
        target = SaveTarget.of(
            config,
            state.train_state.step,
            non_persistent=non_persistent_ckpt,
            local=local_manager_of(config, checkpointing_context),
            rank=runtime.global_rank,
        )
        queue = _queue_of(state, control) if config.async_save else None
        state.train_state.floating_point_operations_so_far = num_floating_point_operations_so_far
        parts = saved_parts_of(state, model, optimizer, opt_param_scheduler, prebuilt_state_dict)
        common = _common(state, target, preprocess_common_state_dict_fn)
        loader = dataloader_state_of(train_data_iterator)
    said = control.gather(
        {"common": common, "optimizer": parts.optimizer is not None, "loader": digest_of(loader)},
        f"agreeing on what is saved to {target.directory}",
    )
    refuse_disagreement([one["common"] for one in said], f"save to {target.directory}")
    staged = parts.staged(state, target, control)
    if config.also_save_hf_checkpoint and not target.is_local:
        staged = staged.with_export(HFExport.gather(state, model, control, where=target.directory))
    with together(control, f"collecting what is saved to {target.directory}"):
        small = small_files_of(
            state,
            target,
            runtime,
            state_id=(staged.info or {}).get("id"),
            rng_state=(prebuilt_state_dict or {}).get("rng_state"),
            has_optimizer=any(one["optimizer"] for one in said),
            loader=loader_files([one["loader"] for one in said], loader, control.rank),
            module_name=module_name,
        )
    if queue is not None:
        staged = queue.snapshot(staged)
    save = _OpenSave(target, staged, small, control, storage or LocalStorage(durable=config.durable))
    request = save.begin(max_shard_size=config.max_shard_size)
    train_state, place = state.train_state.to_plain(), _place(pipeline_rank, tensor_rank)
    request.add_finalize_fn(lambda: save.advance_tracker(train_state))
    request.add_finalize_fn(lambda: save.tell(callback_manager, state, place))
    request.add_finalize_fn(save.remove_old)
    if queue is not None:
        schedule_async_save(state, request)
    else:
        request.execute_sync()


class _OpenSave:
    """One save, from the moment when its directory is reserved."""

    def __init__(
        self,
        target: SaveTarget,
        staged: StagedState,
        small: SmallFiles,
        control: Coordinator,
        storage: LocalStorage,
    ) -> None:
        self._target, self._staged, self._small = target, staged, small
        self._control, self._storage = control, storage
        self._open = ExitStack()

    def begin(self, *, max_shard_size: int | str | None) -> AsyncRequest:
        """Reserve the directory, and return what writes and publishes it. Collective."""
        local = self._target.is_local
        files = Solo() if local else self._control
        with ExitStack() as opened:  # which undoes the reservation if another rank has failed
            with together(self._control, f"reserving {self._target.directory}") if local else nullcontext():
                save = opened.enter_context(transaction(self._target.directory, files, storage=self._storage))
            self._open = opened.pop_all()
        return AsyncRequest(
            self._staged.write,
            (save,),
            async_fn_kwargs={"max_shard_size": max_shard_size},
            conclude=lambda _, error: self._conclude(save, error),
            directory=self._target.directory,
        )

    def advance_tracker(self, train_state: Mapping[str, Any]) -> None:
        """Make the checkpoint the one that counts. Local ones need no tracker: all that are whole count."""
        doing = f"making {self._target.directory}, which is in place, the checkpoint that counts"
        with together(self._control, doing):
            if self._control.rank == 0 and not self._target.is_local:
                write_trackers(self._target.root, train_state, self._storage)

    def tell(self, callbacks: CheckpointCallbacks | None, state: GlobalState, place: str) -> None:
        """Say that the checkpoint is in place, and counts."""
        if self._control.rank == 0:
            logger.info("saved step %d to %s%s", self._target.iteration, self._target.directory, place)
        with together(self._control, f"telling of {self._target.directory}, which counts"):
            if callbacks is not None:
                callbacks.on_checkpoint_save(self._target.directory, state)

    def remove_old(self) -> None:
        """Remove what is too old; a failure of that is no failure of the save."""
        target = self._target
        if target.keep < 0 or not (target.is_local or self._control.rank == 0):
            return
        try:
            remove_old_checkpoints(
                target.root,
                target.keep,
                newest=target.iteration,
                protected=(target.iteration,),
                storage=self._storage,
            )
        except (OSError, CheckpointError) as error:
            logger.warning("old checkpoints in %s are not removed: %s", target.root, error)

    def _conclude(self, save: Transaction, error: BaseException | None) -> None:
        """Write what is small, and publish: on all ranks, or on none."""
        try:
            if error is None:
                self._small.write(save)
        except Exception as caught:
            error = caught
        local = self._target.is_local
        voting = together(self._control, f"saving {self._target.directory}") if local else nullcontext()
        with voting, self._open:
            if error is not None:
                raise error


def _queue_of(state: GlobalState, control: Coordinator) -> AsyncCallsQueue:
    """Return what saves in the background: the state's, which gets one if it has none."""
    wanted = state.checkpoint_config.async_worker
    if state.async_calls_queue is None:
        state.async_calls_queue = AsyncCallsQueue(control, worker=wanted)
    elif wanted == "process" and state.async_calls_queue.worker != wanted:
        raise ConfigError(
            f"async_worker is 'process', but the state's queue has a {state.async_calls_queue.worker}: "
            "make it with AsyncCallsQueue(worker='process')"
        )
    return state.async_calls_queue


def _common(
    state: GlobalState,
    target: SaveTarget,
    preprocess: Callable[[dict[str, Any]], Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """Return what the ranks must agree on."""
    config = state.checkpoint_config
    common = {
        "train_state": state.train_state.to_plain(),
        "kind of checkpoint": target.kind.name,
        "directory": None if target.is_local else target.directory,
        "ckpt_format": config.ckpt_format,
        "save_optim": config.save_optim,
        "save_rng": config.save_rng,
        "async_save": config.async_save,
        "most_recent_k": config.most_recent_k,
    }
    return common if preprocess is None else dict(preprocess(common))


def _place(pipeline_rank: int | None, tensor_rank: int | None) -> str:
    said = {"pipeline rank": pipeline_rank, "tensor rank": tensor_rank}
    return "".join(f" ({name} {rank})" for name, rank in said.items() if rank is not None)
