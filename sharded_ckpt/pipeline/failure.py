"""How the failure of one rank of a pipeline becomes an error on all of them, with the name of that rank.

Nobody votes as long as all is well: the ranks already wait for each other's tensors. A rank that fails breaks
its connections, so that those who wait for it wake up; then all vote. Where a rank stays silent, the others
wake up when their patience ends, and the vote tells who did not come.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from patchers.errors import CollectiveError
from sharded_ckpt.collective.agreement import silence_of
from sharded_ckpt.collective.control_group import ControlGroup, control_group

if TYPE_CHECKING:
    from sharded_ckpt.pipeline.links import Links
    from sharded_ckpt.runtime import Runtime

_LAUNCHER_PATIENCE = 20.0
"""Seconds to find out whom to blame after a SIGTERM; torchrun kills after 30."""


@contextmanager
def failing_together(runtime: Runtime, links: Links | None, doing: str) -> Iterator[None]:
    """Make an error of one rank one of all ranks.

    Launchers end all ranks when one has died, often before the survivors could say which. So SIGTERM waits
    until this context is left: well, then it does its work; or by an error, which ends the rank anyway.

    Args:
        runtime: The ranks.
        links: Their connections; None for a single rank, whose errors stay what they are.
        doing: What is being done, in the same words on all ranks.

    Raises:
        CollectiveError: On all ranks, naming those that failed, died or stayed silent.
    """
    if links is None:
        yield
        return
    links.require_whole()
    with _postponed_termination() as terminating:
        try:
            yield
        except Exception as error:
            waited = getattr(error, "waited", 0.0)
            links.abort(f"{type(error).__name__}: {error}")
            if isinstance(error, CollectiveError) and error.agreed:
                raise  # of a vote inside, in which ranks that failed elsewhere took part, too
            patience = max(runtime.timeout - waited, silence_of(runtime.timeout) / 4)
            if terminating:
                patience = min(patience, _LAUNCHER_PATIENCE)
            _coordinator(runtime, patience).vote(error, doing)
            raise
        except BaseException:  # the user, or the end of the process: the others shall not wait for it
            links.abort("interrupted")
            raise


def _coordinator(runtime: Runtime, patience: float) -> Any:
    if isinstance(runtime.control, ControlGroup):
        return control_group(runtime.process_group, timeout=patience)
    return runtime.control


@contextmanager
def _postponed_termination() -> Iterator[list[int]]:
    """Yield a list that gets a SIGTERM that comes meanwhile; it is delivered again if all went well."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, lambda number, _frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
    if came:
        os.kill(os.getpid(), signal.SIGTERM)
