from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from support.gloo import Gloo

# Threads that share tiny work wait for each other: beside other work, nine times as long as one of them takes
# alone. It counts for all processes that tests start, too; torch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite; what is named on the command line runs in one, where pdb works."""
    return 0 if config.args_source is pytest.Config.ArgsSource.ARGS else 2


@pytest.fixture(scope="session")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Gloo:
    """Real gloo ranks: `gloo.run(fn, *args, world_size=4)`."""
    return Gloo(tmp_path_factory.mktemp("gloo"))


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """No test leaves a process group, a thread or another default dtype behind."""
    threads = set(threading.enumerate())
    yield
    left = _leaked_threads(threads) + _leaked_torch_state()
    assert not left, f"this test left behind: {', '.join(left)}"


def _leaked_threads(before: set[threading.Thread]) -> list[str]:
    limit = time.monotonic() + 1.0
    while True:
        left = [t.name for t in threading.enumerate() if t not in before and not _is_tqdm_monitor(t)]
        if not left or time.monotonic() > limit:
            return left
        time.sleep(0.01)


def _is_tqdm_monitor(thread: threading.Thread) -> bool:
    return type(thread).__name__ == "TMonitor"  # one for the whole process, by design


def _leaked_torch_state() -> list[str]:
    torch = sys.modules.get("torch")  # importing it here would cost every light test two seconds
    if torch is None or not hasattr(torch, "distributed"):
        return []
    left = []
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        left.append("a process group")
    if torch.get_default_dtype() != torch.float32:
        left.append(f"the default dtype {torch.get_default_dtype()}")
        torch.set_default_dtype(torch.float32)
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        left.append("gradients switched off")
    return left
