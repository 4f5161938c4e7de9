"""Processes that may be killed: forks of a single-threaded process that has imported torch."""

from __future__ import annotations

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from support.gloo import _server


def run_apart(fn: Callable[..., Any], *args: Any, timeout: float = 200.0) -> Any:
    """Run a module-level function of `support` in a process of its own, from which `fork` may be used.

    Returns:
        What it returns.

    Raises:
        AssertionError: It failed; with its traceback.
    """
    context = _server()
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, fn, args), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(timeout), f"{fn.__name__} did not end within {timeout} s"
        failed, value = ours.recv()
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()
    if failed:
        raise AssertionError(value)
    return value


def _serve(pipe: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.send((False, fn(*args)))
    except BaseException:
        pipe.send((True, traceback.format_exc()))


def fork(work: Callable[[], Any]) -> int:
    """Run `work` in a fork and return its process id; it exits with 0, or 1 if it raised."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def kill_after(pid: int, seconds: float) -> bool:
    """Kill a process after a time, unless it ends before; return whether it was killed."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.0002)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
