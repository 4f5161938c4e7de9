"""Paired benchmarks: methods alternate, each run is a fork of a parent that has imported everything.

So import costs and the history of the allocator are the same for all, and a slow minute of the machine hits
all of them. A round in which a run waited for a processor more than a tenth of its running time is discarded.
The parent itself computes nothing: threads that it started would be missing in its forks.
"""

from __future__ import annotations

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
        share: The least part of its time that the main thread of a run must have had a processor.
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
    """Bring files into the page cache."""
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


def _measure(method: Method, touch: bool) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")
    before, ran, waited = _status(), *_schedule()
    started = time.perf_counter()
    tensors = list(method())
    load = time.perf_counter() - started
    if touch:
        for tensor in tensors:
            _read(tensor)
    total = time.perf_counter() - started
    after, now = _status(), _schedule()
    ran, waited = now[0] - ran, now[1] - waited
    return {
        "load": load,
        "total": total,
        "share": ran / max(ran + waited, 1),
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


def _schedule() -> tuple[int, int]:
    """Return how long the main thread ran, and waited for a processor, in nanoseconds."""
    ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return int(ran), int(waited)
