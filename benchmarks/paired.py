"""Paired benchmarks: methods alternate, each run is a fork of a parent that has imported everything.

So import costs and the history of the allocator are the same for all, and a slow minute of the machine hits
all of them. A round is discarded in which the main thread of a run waited for a processor more than a tenth
of its running time, unless it waited for threads of its own: for as long others must have had a processor.
The parent itself computes nothing: threads that it started would be missing in its forks.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

MB = 2**20

_LIBC = ctypes.CDLL(None)
_POPULATE_READ, _POPULATE_WRITE = 22, 23
"""`MADV_POPULATE_READ` and `_WRITE` of Linux 5.14."""

Method: TypeAlias = Callable[[], Iterable[torch.Tensor]]
"""Loads something and returns its tensors."""


@dataclass
class Measure:
    """Medians of one method."""

    load: list[float] = field(default_factory=list)
    """Seconds until it returned."""
    total: list[float] = field(default_factory=list)
    """Seconds until every byte was touched, too."""
    peak: list[float] = field(default_factory=list)
    """MiB of resident memory above the begin, at most."""
    anon: list[float] = field(default_factory=list)
    """MiB of anonymous memory above the begin, at the end."""
    error: str = ""

    def add(self, result: Mapping[str, float]) -> None:
        """Note one run."""
        for name in ("load", "total", "peak", "anon"):
            getattr(self, name).append(result[name])


def compare(
    methods: Mapping[str, Method],
    rounds: int,
    *,
    prepare: Callable[[], None] = lambda: None,
    touch: bool = True,
    share: float = 0.9,
) -> dict[str, Measure]:
    """Run every method once a round, in turn forwards and backwards.

    Args:
        methods: The first one is what the others are compared with.
        rounds: How many rounds count.
        prepare: Called before each run, such as to empty the page cache.
        touch: Whether the tensors are read after the load.
        share: The least part of its time that the main thread of a run must have had a processor, or in which
            nobody else must have had one.
    """
    measures = {name: Measure() for name in methods}
    for name, result in _round(list(methods), methods, prepare, touch).items():
        measures[name].error = result.get("error", "")  # this round warms up, and tells who cannot run
    able = [name for name in methods if not measures[name].error]
    fair = 0
    for number in range(3 * rounds):
        results = _round(able if number % 2 else able[::-1], methods, prepare, touch)
        if all(result.get("share", 0) >= share for result in results.values()):
            fair += 1
            for name, result in results.items():
                measures[name].add(result)
        if fair == rounds:
            break
    return measures


def _round(
    order: list[str], methods: Mapping[str, Method], prepare: Callable[[], None], touch: bool
) -> dict[str, dict[str, Any]]:
    results = {}
    for name in order:
        prepare()
        results[name] = run_apart(lambda name=name: _measure(methods[name], touch))
    return results


def table(title: str, measures: Mapping[str, Measure]) -> str:
    """Return medians, and the median of the ratios to the first method within rounds, as Markdown."""
    lines = [
        f"### {title}",
        "",
        "| method | load s | with touch s | x first | peak MiB | anonymous MiB |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(measures.values()))
    for name, measure in measures.items():
        if not measure.total:
            lines.append(f"| {name} | {measure.error or 'no fair round'} | | | | |")
            continue
        ratios = [a / b for a, b in zip(measure.total, first.total, strict=False)]
        load, total, ratio = map(statistics.median, (measure.load, measure.total, ratios))
        peak, anon = map(statistics.median, (measure.peak, measure.anon))
        lines.append(f"| {name} | {load:.3f} | {total:.3f} | {ratio:.2f} | {peak:.0f} | {anon:.0f} |")
    return "\n".join(lines) + f"\n\n{len(first.total)} rounds.\n"


def evict(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(files: Iterable[Path]) -> None:
    """Bring files into the page cache, as they lie there when somebody has read them.

    What was written lies there in small pieces, and takes more than twice as long to map and touch: 12,000
    page faults for a gigabyte, 900 once it was read.
    """
    files = list(files)
    os.sync()
    evict(files)
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.read(8 * MB):
                pass


def run_apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do something in a fork and return what it returned, or its error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            result = work()
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            result = {"error": f"{type(error).__name__}: {error}"[:200]}
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else {"error": "died"}


def settle() -> None:
    """Map and copy now what a fork shares with its parent: by itself it would do so while time is taken.

    A fork begins without the page tables of libraries and copies a page of the heap at its first write, and a
    reference count is a write. A process that had done its imports itself would pay none of these 4,500 page
    faults (30 ms in a load of 60).
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, rights, *_ = line.split()
        begin, end = (int(address, 16) for address in place.split("-"))
        if rights[0] == "r" and end < 1 << 63:
            advice = _POPULATE_WRITE if rights[1] == "w" and rights[3] == "p" else _POPULATE_READ
            _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def _measure(method: Method, touch: bool) -> dict[str, float]:
    settle()
    Path("/proc/self/clear_refs").write_text("5")
    before, ran, waited = _status(), *_schedule()
    others = _others()
    started = time.perf_counter()
    tensors = list(method())
    load = time.perf_counter() - started
    if touch:
        for tensor in tensors:
            _read(tensor)
    total = time.perf_counter() - started
    after, now = _status(), _schedule()
    ran, waited, others = now[0] - ran, now[1] - waited, _others() - others
    return {
        "load": load,
        "total": total,
        "share": max(ran / max(ran + waited, 1), 1 - others / total),
        "peak": (after["VmHWM"] - before["VmRSS"]) / MB,
        "anon": (after["RssAnon"] - before["RssAnon"]) / MB,
    }


def _read(tensor: torch.Tensor) -> int:
    raw = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    words = raw[: len(raw) // 8 * 8].view(np.uint64)
    return int(np.bitwise_xor.reduce(words)) if len(words) else 0


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in fields}


def _others() -> float:
    """Return the seconds in which processors worked for others than this process, to a hundredth."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    own = os.times()
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _schedule() -> tuple[int, int]:
    """Return how long the main thread ran, and waited for a processor, in nanoseconds."""
    ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return int(ran), int(waited)
