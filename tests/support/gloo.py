"""Real ranks for the tests: gloo processes that start in milliseconds.

One server process imports torch and transformers once; every rank of every test is a fresh fork of it. So no
test inherits anything from another one, and a rank may be killed or frozen at will.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from patchers.errors import UntestedVersionWarning

PRELOADED = ["pytest", "torch.distributed", "transformers.models.llama.modeling_llama"]
START_SECONDS = 120.0
EXIT_SECONDS = 10.0


class RankFailure(Exception):
    """Why a rank has no result.

    Attributes:
        rank: The rank.
        kind: "raised", "died" (the process ended by itself) or "hung" (it had to be killed).
        type: Name of the exception's class, such as "CollectiveError"; "" unless it raised.
        text: The exception's text, or what happened.
        cause: "Type: text" of the exception's `__cause__`, or None.
        error: The exception itself where it can be pickled, else None.
        trace: The traceback in the rank, or the end of what it printed.
    """

    def __init__(self, rank: int, kind: str, text: str, **details: Any) -> None:
        super().__init__(rank, kind, text)
        self.rank, self.kind, self.text = rank, kind, text
        self.type: str = details.get("type", "")
        self.cause: str | None = details.get("cause")
        self.error: BaseException | None = details.get("error")
        self.trace: str = details.get("trace", "")

    def __str__(self) -> str:
        return f"rank {self.rank} {self.kind}: {self.type} {self.text}\n{self.trace}"


class Gloo:
    """Runs a function on several gloo ranks at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs = itertools.count()
        self._context: Any = None

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        world_size: int = 2,
        timeout: float = 60.0,
        store: str = "file",
        lost: Collection[int] = (),
    ) -> list[Any]:
        """Run `fn(*args)` on every rank, inside a fresh process group.

        Args:
            fn: A module-level function; its module may be a test file or one of `support`.
            args: What it is given; they and the result must pickle.
            world_size: How many ranks.
            timeout: Seconds from the moment when all ranks are ready; also that of the process group.
            store: Where the ranks meet: "file", or "tcp" (a store that lives in rank 0, as without torchrun).
            lost: Ranks that are meant to die or freeze: no longer waited for once the others are done.

        Returns:
            The result, or a `RankFailure`, of every rank in rank order.
        """
        folder = self._folder / f"run{next(self._runs)}"
        folder.mkdir()
        ranks = [self._start(rank, folder) for rank in range(world_size)]
        try:
            task = (_where(fn), pickle.dumps(args), world_size, timeout, store, str(folder))
            return _conduct(ranks, task, timeout, lost)
        finally:
            for rank in ranks:
                rank.end()

    def run_ok(self, fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Like `run`; raises the first failure if any rank failed."""
        results = self.run(fn, *args, **options)
        for result in results:
            if isinstance(result, RankFailure):
                raise result
        return results

    def _start(self, rank: int, folder: Path) -> _Rank:
        if self._context is None:
            self._context = _server()
        return _Rank(self._context, rank, folder / f"rank{rank}.log")


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # Asking the driver for its devices must not open it in the server: a fork could not use it any more.
    environment = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


# The parent's side -----------------------------------------------------------------------------------------


class _Rank:
    """The parent's handle of one rank."""

    def __init__(self, context: Any, rank: int, log: Path) -> None:
        self.rank, self.log = rank, log
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, rank, str(log)), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self, seconds: float) -> Any:
        """Return what the rank says next, or a `RankFailure`."""
        try:
            if self.pipe.poll(max(0.0, seconds)):
                return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            self.process.join(EXIT_SECONDS)
            text = f"the process ended with exit code {self.process.exitcode}"
            return RankFailure(self.rank, "died", text, trace=self._tail())
        return RankFailure(self.rank, "hung", "no answer in time", trace=self._tail())

    def leave(self) -> RankFailure | None:
        """Wait until a rank that did well has exited; say so if it does not exit well."""
        self.process.join(EXIT_SECONDS)
        if self.process.exitcode == 0:
            return None
        text = f"did its work, then left with exit code {self.process.exitcode}"
        return RankFailure(self.rank, "died", text, trace=self._tail())

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""


def _conduct(ranks: list[_Rank], task: Any, timeout: float, lost: Collection[int]) -> list[Any]:
    for rank in ranks:
        rank.pipe.send_bytes(pickle.dumps(task))
    began = time.monotonic()
    for rank in ranks:  # each says that it has imported the function
        answer = rank.receive(began + START_SECONDS - time.monotonic())
        if isinstance(answer, RankFailure):
            raise answer
    for rank in ranks:
        rank.pipe.send_bytes(b"go")
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    for rank in sorted(ranks, key=lambda rank: (rank.rank in lost, rank.rank)):
        seconds = 0.2 if rank.rank in lost else deadline - time.monotonic()
        results[rank.rank] = rank.receive(seconds)
    if not any(isinstance(result, RankFailure) for result in results.values()):
        for rank in ranks:
            results[rank.rank] = rank.leave() or results[rank.rank]
    return [results[rank.rank] for rank in ranks]


def _where(fn: Callable[..., Any]) -> tuple[str, str, str]:
    return str(sys.modules[fn.__module__].__file__), fn.__module__, fn.__qualname__


# The ranks' side -------------------------------------------------------------------------------------------


def _serve(pipe: Connection, rank: int, log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which ends its ranks
    atexit._clear()  # what the server would do at its own exit
    weakref.finalize._registered_with_atexit = False
    answer = _answer(pipe, rank)
    try:
        message = pickle.dumps(answer)
    except Exception as error:
        message = pickle.dumps(RankFailure(rank, "raised", f"the result does not pickle: {error}"))
    pipe.send_bytes(message)
    _leave_group()
    atexit._run_exitfuncs()  # a forked process would skip what an ordinary one does


def _answer(pipe: Connection, rank: int) -> Any:
    try:
        where, args, *group = pickle.loads(pipe.recv_bytes())
        fn = _function(*where)
        arguments = pickle.loads(args)
        pipe.send_bytes(pickle.dumps("ready"))
        pipe.recv_bytes()
        _join_group(rank, *group)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", UntestedVersionWarning)  # as setup.cfg has it
            return fn(*arguments)
    except Exception as error:
        return _failure(rank, error)


def _failure(rank: int, error: Exception) -> RankFailure:
    cause = error.__cause__
    details = {
        "type": type(error).__name__,
        "cause": f"{type(cause).__name__}: {cause}" if cause else None,
        "trace": "".join(traceback.format_exception(error)),
    }
    failure = RankFailure(rank, "raised", str(error), **details, error=error)
    try:
        pickle.loads(pickle.dumps(failure))
    except Exception:
        failure.error = None
    return failure


def _function(file: str, module: str, qualname: str) -> Callable[..., Any]:
    found: Any = _module(file, module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def _module(file: str, name: str) -> ModuleType:
    """Import a module; a test file by its path, under the name that pytest gave it, so that pickles agree."""
    if name in sys.modules:
        return sys.modules[name]
    if name.startswith("support."):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    package = name.rpartition(".")[0]
    if package:  # pickle imports it first; to Python the folder of the tests is no package
        sys.modules.setdefault(package, ModuleType(package))
    spec.loader.exec_module(module)
    return module


def _join_group(rank: int, world_size: int, timeout: float, store: str, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    limit = timedelta(seconds=timeout)
    where: dict[str, Any] = {"init_method": f"file://{folder}/meeting"}
    if store == "tcp":
        where = {"store": _tcp_store(rank, Path(folder) / "port", limit)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=limit, **where)
    dist.barrier()  # a rank with nothing to do would be gone before the others are connected to it


def _tcp_store(rank: int, note: Path, limit: timedelta) -> Any:
    import torch.distributed as dist

    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=limit, wait_for_workers=False)
        note.with_suffix(".new").write_text(str(store.port))
        note.with_suffix(".new").rename(note)
        return store
    while not note.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(note.read_text()), timeout=limit)


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
