"""Saves that go on while training does.

A worker writes what has been staged; it never waits for other ranks. All that ranks do together happens on
the main thread: when all ranks' workers are done, the save is concluded (published, on all ranks or on none),
and then what comes after it is done, in order. So nothing is published before it is complete, and an error of
one rank is raised by all of them, once: at the next save, at a wait, or when the queue is closed.
"""

from __future__ import annotations

import logging
import weakref
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from patchers.errors import CollectiveError, ConfigError
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.runtime import default_runtime
from sharded_ckpt.training.checkpointing.async_request import AsyncRequest as AsyncRequest
from sharded_ckpt.training.host_buffers import HostBuffers
from sharded_ckpt.training.writer_process import WriterProcess

if TYPE_CHECKING:
    from torch.distributed.checkpoint import StorageWriter

    from sharded_ckpt.training.checkpointing.config import CheckpointConfig
    from sharded_ckpt.training.checkpointing.train_state import GlobalState
    from sharded_ckpt.training.state_files import StagedState

logger = logging.getLogger(__name__)


class AsyncCallsQueue:
    """Saves in the background, at most one at a time.

    All ranks make one, and make the same calls in the same order.

    Args:
        control: The ranks that save together. By default torch.distributed says, or this is the only process.
        worker: What writes: a `"thread"` of this process, or a `"process"` of its own, which takes no time of
            this interpreter. That process is no fork and does not import the running script, so scripts need
            no guard for it; it takes a few seconds to come up, at the first save, in the background.

    Example:
        >>> order = []
        >>> with AsyncCallsQueue() as queue:
        ...     request = AsyncRequest(lambda: order.append("written"))
        ...     request.add_finalize_fn(lambda: order.append("finalized"))
        ...     number = queue.schedule_async_request(request)
        >>> order
        ['written', 'finalized']
    """

    def __init__(
        self, control: Coordinator | None = None, *, worker: Literal["thread", "process"] = "thread"
    ) -> None:
        if worker not in ("thread", "process"):
            raise ConfigError(f"the worker is {worker!r}; it must be 'thread' or 'process'")
        self.control = control or default_runtime().control
        self.worker = worker
        self._buffers = HostBuffers(shared=worker == "process")
        self._process = WriterProcess() if worker == "process" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._flight: tuple[AsyncRequest, Future[Any]] | None = None
        self._calls, self._closed = 0, False
        self._unpublished: list[str] = []
        weakref.finalize(self, _tell, self._unpublished)

    def __enter__(self) -> AsyncCallsQueue:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Close; after an error, without publishing what is under way."""
        if error is None:
            self.close()
        else:
            self._abandon(error)
            self._release()

    @property
    def in_flight(self) -> AsyncRequest | None:
        """The save that is under way, if there is one."""
        return self._flight[0] if self._flight else None

    def snapshot(self, staged: StagedState) -> StagedState:
        """Copy what a save has staged into this queue's memory, so that training may go on.

        The memory is as large as what is staged and is kept for the next save. The save that is under way is
        finished first.

        Raises:
            CollectiveError: The save before failed on some rank; all ranks raise it.
        """
        self.maybe_finalize_async_calls(blocking=True)
        self._require_open()
        with together(self.control, "copying what is to be saved"):
            copied = staged.snapshot(self._buffers)
        if self._process is None:
            return copied
        return replace(copied, write_tensors=self._process.writing(self._buffers))

    def schedule_async_request(self, async_request: AsyncRequest) -> int:
        """Begin to write; the save that is under way is finished first.

        Returns:
            Which save of this queue it is, from 0.

        Raises:
            CollectiveError: The save before failed on some rank; all ranks raise it, and nothing was begun.
        """
        self.maybe_finalize_async_calls(blocking=True)
        self._require_open()
        request = async_request.freeze()
        request.call_idx, self._calls = self._calls, self._calls + 1
        self._unpublished.append(str(request))
        self._flight = request, self._thread.submit(request.write)
        return request.call_idx

    def maybe_finalize_async_calls(self, blocking: bool = False) -> list[int]:
        """Conclude and finalize the save under way, if all ranks have written it; collective.

        Args:
            blocking: Whether to wait until they have.

        Returns:
            The number of the save that was finalized, if one was.

        Raises:
            CollectiveError: It failed on some rank; all ranks raise it, once.
        """
        if self._flight is None:
            return []
        request, written = self._flight
        if not blocking and not self._all_have(written):
            return []
        wait([written])
        self._land()
        request.finish(written, self.control)
        return [request.call_idx]

    def get_num_unfinalized_calls(self) -> int:
        """Return how many saves are under way; the same on all ranks."""
        return 0 if self._flight is None else 1

    def close(self) -> None:
        """Finish the save under way, and end the worker; nothing can be saved after. Collective.

        Raises:
            CollectiveError: That save failed on some rank; all ranks raise it.
        """
        try:
            self.maybe_finalize_async_calls(blocking=True)
        finally:
            self._release()

    def _all_have(self, written: Future[Any]) -> bool:
        try:
            return all(self.control.gather(written.done(), "asking whether a save is written"))
        except CollectiveError as error:  # a rank is lost: nothing can be published any more
            self._abandon(error)
            raise

    def _abandon(self, error: BaseException) -> None:
        """Let go of the save under way, unpublished; the other ranks are told the error."""
        if self._flight is None:
            return
        request, written = self._flight
        wait([written])
        self._land()
        if request.conclude is not None:
            try:
                request.conclude(None, error)
            except BaseException as said:
                logger.warning("%s is not published: %s", request, str(said) or type(said).__name__)

    def _land(self) -> None:
        self._flight = None
        self._unpublished.clear()

    def _release(self) -> None:
        self._closed = True
        self._thread.shutdown()
        if self._process is not None:
            self._process.close()
        self._buffers.release()

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("this queue of saves is closed: make another one")


def _tell(unpublished: list[str]) -> None:
    for directory in unpublished:
        logger.error(
            "%s was written, but never published: close the queue of saves before the program ends", directory
        )


def schedule_async_save(global_state: GlobalState, async_request: AsyncRequest) -> None:
    """Begin to save in the background.

    Args:
        global_state: With the queue.
        async_request: What is saved.

    Raises:
        ConfigError: There is no queue; the request would be lost.
        CollectiveError: The save before failed on some rank.
    """
    if global_state.async_calls_queue is None:
        raise ConfigError(
            f"{async_request}: there is no queue that could save in the background; make the state with "
            "GlobalState(cfg, async_calls_queue=AsyncCallsQueue(…)), or save with async_save=False"
        )
    global_state.async_calls_queue.schedule_async_request(async_request)


def maybe_finalize_async_save(
    global_state: GlobalState, ckpt_cfg: CheckpointConfig, blocking: bool = False, terminate: bool = False
) -> None:
    """Publish the save under way if all ranks have written it; to be called after each step, on all ranks.

    Args:
        global_state: With the queue.
        ckpt_cfg: Nothing happens unless it has `async_save`.
        blocking: Whether to wait until the save is written.
        terminate: Whether the queue is closed after that; what is under way is finished in any case then.

    Raises:
        CollectiveError: The save failed on some rank; all ranks raise it, once.
    """
    queue = global_state.async_calls_queue
    if not ckpt_cfg.async_save or queue is None:
        return
    if terminate:
        queue.close()
    else:
        queue.maybe_finalize_async_calls(blocking)


def is_empty_async_queue(global_state: GlobalState) -> bool:
    """Return True if no save is under way; the same on all ranks."""
    queue = global_state.async_calls_queue
    return queue is None or queue.get_num_unfinalized_calls() == 0


def get_save_and_finalize_callbacks(writer: StorageWriter | None, save_state_dict_ret: Any) -> AsyncRequest:
    """Return a request for a save that `torch.distributed.checkpoint.async_save` has begun.

    The queue waits for it, and raises its error, as it does for saves of its own.

    Args:
        writer: The storage writer that it was begun with, if any, which knows where it goes.
        save_state_dict_ret: What `async_save` returned: a future, or an `AsyncSaveResponse`.
    """
    upload = getattr(save_state_dict_ret, "upload_completion", save_state_dict_ret)
    if not isinstance(upload, Future):
        raise ConfigError(
            f"expected what torch.distributed.checkpoint.async_save returns, found a {type(upload).__name__}"
        )
    path = getattr(writer, "path", None)
    return AsyncRequest(upload.result, directory=None if path is None else str(path))
