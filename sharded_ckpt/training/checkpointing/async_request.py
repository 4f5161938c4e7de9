"""One save that is ready to be written: in the foreground at once, or in the background by a queue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from sharded_ckpt.checkpoint.coordinator import Coordinator, Solo


@dataclass
class AsyncRequest:
    """One save that is ready to be written.

    Attributes:
        async_fn: Writes; rank-local, and on a worker. None if there is nothing to write.
        async_fn_args: What it is given.
        finalize_fns: What comes after the save is concluded, in order, on the main thread of all ranks.
        async_fn_kwargs: What else it is given.
        preload_fn: Called on the main thread before the worker begins; returns what takes the place of
            `async_fn_args`.
        is_frozen: Whether no more finalizers can be added.
        call_idx: Which save of its queue this is, from 0; -1 before it is scheduled.
        conclude: Told what `async_fn` returned and what it raised (None where it did not), on the main thread
            of all ranks: publishes if all ranks were well, raises the same error on all ranks if not.
        directory: What is saved to, for errors and for those who clean up.
    """

    async_fn: Callable[..., Any] | None
    async_fn_args: Sequence[Any] = ()
    finalize_fns: list[Callable[[], Any]] = field(default_factory=list)
    async_fn_kwargs: Mapping[str, Any] = field(default_factory=dict)
    preload_fn: Callable[[], Sequence[Any]] | None = None
    is_frozen: bool = False
    call_idx: int = -1
    conclude: Callable[[Any, BaseException | None], None] | None = field(default=None, kw_only=True)
    directory: str | None = field(default=None, kw_only=True)

    def add_finalize_fn(self, fn: Callable[[], Any]) -> None:
        """Add something to be done after what was added before.

        Raises:
            RuntimeError: The request has been scheduled.
        """
        if self.is_frozen:
            raise RuntimeError(f"{self}: was scheduled, so nothing can be added to what comes after it")
        self.finalize_fns.append(fn)

    def execute_sync(self) -> None:
        """Write, conclude and finalize at once: a save in the foreground.

        Raises:
            CollectiveError: Some rank failed; the same on all ranks. Nothing was finalized then.
        """
        request, outcome = self.freeze(), Future[Any]()
        try:
            outcome.set_result(request.write())
        except BaseException as error:
            outcome.set_exception(error)
        request.finish(outcome, Solo())

    def freeze(self) -> AsyncRequest:
        """Return the request as it is now, to which nothing can be added."""
        args = self.async_fn_args if self.preload_fn is None else self.preload_fn()
        done = list(self.finalize_fns)
        return replace(self, async_fn_args=args, preload_fn=None, finalize_fns=done, is_frozen=True)

    def write(self) -> Any:
        """Write, here and now; what came of it is for `finish`."""
        return None if self.async_fn is None else self.async_fn(*self.async_fn_args, **self.async_fn_kwargs)

    def finish(self, written: Future[Any], control: Coordinator) -> None:
        """Conclude, then finalize; on the main thread of all ranks.

        Args:
            written: What came of `write`.
            control: All ranks.

        Raises:
            CollectiveError: Some rank failed; the same on all ranks. Nothing was finalized then.
        """
        error = written.exception()
        if self.conclude is not None:
            self.conclude(None if error else written.result(), error)
        else:
            control.vote(error, f"saving {self}")
        for fn in self.finalize_fns:
            fn()

    def __str__(self) -> str:
        return self.directory or f"async save {self.call_idx}"
