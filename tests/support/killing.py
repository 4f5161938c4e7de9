"""Savers that die, and what is left after. These run in a process of their own."""

from __future__ import annotations

import math
import os
import random
import resource
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.checkpoint.reader import open_checkpoint
from sharded_ckpt.checkpoint.storage import LocalStorage
from support.checkpoints import recovered_version, save_version, values, version_in
from support.forks import fork, kill_after
from support.storages import DeadlyStorage, NoExchange


class DeadlyNoExchange(DeadlyStorage, NoExchange):
    """Kills its process at the n-th operation, on a file system that cannot exchange."""

    def exchange(self, first: Any, second: Any) -> None:
        self._enter("exchange")
        NoExchange.exchange(self, first, second)


def die_at_every_operation(parent: str, mode: str) -> dict[str, int]:
    """Kill a saver before its n-th operation, for every n, and check what is left each time.

    Returns:
        How many died, and after how many of these the old or the new checkpoint was there.
    """
    directory, counts = Path(parent) / "ckpt", {"died": 0, "old": 0, "new": 0}
    healthy = NoExchange(durable=False) if mode == "name by name" else LocalStorage(durable=False)
    old: int | None = None
    for number in range(1, 1000):
        new = number
        kind = DeadlyNoExchange if mode == "name by name" else DeadlyStorage
        pid = fork(lambda n=new, kind=kind, number=number: save_version(directory, n, storage=kind(number)))
        status = os.waitpid(pid, 0)[1]
        found = recovered_version(directory)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            assert found == new
            return counts
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert found in (old, new), f"operation {number}: {found} is neither {old} nor {new}"
        counts["died"] += 1
        counts["new" if found == new else "old"] += 1
        if mode == "new":
            _next_save(Path(parent), Path(parent) / "other", 0, healthy)
            if directory.exists():
                directory.rename(Path(parent) / "done")
                _remove(Path(parent) / "done")
            _remove(Path(parent) / "other")
        else:
            old = 1000 + number
            _next_save(Path(parent), directory, old, healthy)
    raise AssertionError("it never ends")


def die_at_random_moments(parent: str, mode: str, times: int, seed: int) -> dict[str, int]:
    """Kill a saver at random moments, so often, and until one died after its commit too."""
    directory, counts, dice = Path(parent) / "ckpt", {"died": 0, "old": 0, "new": 0}, random.Random(seed)
    storage = NoExchange() if mode == "name by name" else LocalStorage()
    began = time.monotonic()
    for version in (1, 2, 3):
        save_version(directory, version, storage=storage)
    latest, old, new = 1.5 * (time.monotonic() - began) / 3, 3, 4
    while counts["died"] < times or not counts["new"]:
        pid = fork(lambda n=new: save_version(directory, n, storage=storage))
        killed = kill_after(pid, dice.uniform(0, latest))
        latest *= 1.03 if killed else 0.9  # the machine is never as fast as when the usual time was taken
        found = recovered_version(directory)
        assert found in ((old, new) if killed else (new,))
        if killed:
            counts["died"] += 1
            counts["new" if found == new else "old"] += 1
            if dice.random() < 0.5:  # some litter meets litter
                new += 1
                _next_save(Path(parent), directory, new, storage)
                found = new
        old, new = found, new + 1
    _next_save(Path(parent), directory, new, storage)
    return counts


def _next_save(parent: Path, directory: Path, version: int, storage: LocalStorage) -> None:
    save_version(directory, version, storage=storage)
    assert version_in(directory) == version
    left = [name for name in os.listdir(parent) if name.startswith(".")]
    left += [str(path) for path in directory.rglob("*") if path.name.startswith(".") or "rank-" in path.name]
    assert not left, f"left behind: {left}"


def _remove(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def save_beyond_a_limit(parent: str) -> str:
    """Save files that are larger than this process may write; return what the system said."""
    directory = Path(parent) / "ckpt"
    save_version(directory, 1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4500, resource.RLIM_INFINITY))
    try:
        save_version(directory, 2)
    except OSError as error:
        return str(error.__cause__.strerror) if isinstance(error.__cause__, OSError) else repr(error)
    return "nothing"


def read_while_others_save(parent: str, mode: str, times: int) -> dict[str, int]:
    """Read a checkpoint over and over while a fork saves to it; every read must be of one save."""
    directory = Path(parent) / "ckpt"
    storage = NoExchange(durable=False) if mode == "name by name" else LocalStorage(durable=False)
    save_version(directory, 0, storage=storage)

    def save() -> None:
        for version in range(1, times + 1):
            save_version(directory, version, storage=storage)

    pid, counts, last = fork(save), {"reads": 0, "versions": 0}, -1
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        version = _read_whole(directory)
        assert version >= last, "time goes forward"
        counts["reads"] += 1
        counts["versions"] += version != last
        last = version
        if ended:
            assert status == 0
            assert last == times
            return counts


def _read_whole(directory: Path) -> int:
    reader = open_checkpoint(directory, lambda index: index.keys())
    found = reader.read()
    version = int(found["scale"])
    wanted = values(version)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), f"{name} is not of version {version}"
    return version


def save_by_many(parent: str, savers: int, times: int) -> dict[str, int]:
    """Let forks save into one directory over and over; count what became of their saves."""
    directory = Path(parent) / "ckpt"
    save_version(directory, 0, durable=False)
    logs = [Path(parent) / f"log{saver}" for saver in range(savers)]

    def work(saver: int) -> None:
        with logs[saver].open("a") as log:
            for version in range(saver, times, savers):
                try:
                    save_version(directory, version, durable=False)
                    log.write("saved\n")
                except CheckpointError as error:
                    log.write("refused\n" if "another save into" in str(error) else f"{error}\n")

    pids = [fork(partial(work, saver)) for saver in range(savers)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * savers
    assert version_in(directory) is not None
    words = [word for log in logs for word in log.read_text().splitlines()]
    return {word: words.count(word) for word in words}


def peak_of_saving(parent: str, contiguous: bool, nbytes: int) -> float:
    """Return by how many bytes the memory of a process that saves rises at most."""
    side = math.isqrt(nbytes // 4 // 4)
    tensors = {str(i): torch.ones(side, side) for i in range(4)}
    if not contiguous:
        tensors = {name: tensor.T for name, tensor in tensors.items()}
    for name in ("first", "second"):  # what the first save loads, the second one has
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmRSS")
        with transaction(Path(parent) / name, durable=False) as save:
            save.write_tensors(tensors)
    return _memory("VmHWM") - before


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field))
