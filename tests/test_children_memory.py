"""What goes from file to file, or is computed on the way, stays in memory no longer than needed."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sharded_ckpt.checkpoint.writer import write_tensors
from sharded_ckpt.children.memory import MappedStorage, allocate

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_child.py"


def resident(mapping: mmap.mmap) -> int:
    """How many bytes of a mapping are in memory."""
    address = np.frombuffer(mapping, dtype=np.uint8).__array_interface__["data"][0]
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        begin, dash, end = line.partition(" ")[0].partition("-")
        if dash and int(begin, 16) <= address < int(end, 16):
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))
    raise LookupError(f"no mapping at {address:x}")


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("begin", [0, 4104])
def test_pages_of_a_mapping_go_when_they_are_written(tmp_path: Path, begin: int, durable: bool) -> None:
    nbytes, content = 40 * 2**20, os.urandom(2**20) * 41
    (tmp_path / "source").write_bytes(content)
    with open(tmp_path / "source", "rb") as file:
        mapping = mmap.mmap(
            file.fileno(), len(content), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    tensor = torch.frombuffer(mapping, dtype=torch.uint8, offset=begin, count=nbytes)
    storage = MappedStorage(durable=durable)
    storage.adopt(mapping)
    write_tensors(tmp_path / "copy", {"tensor": tensor}, storage=storage)
    assert resident(mapping) < 2**20
    written = (tmp_path / "copy").read_bytes()[-nbytes:]
    assert written == content[begin : begin + nbytes] == tensor.numpy().tobytes()  # read anew


def test_memory_that_is_no_mapping_of_a_file_is_left_alone(tmp_path: Path) -> None:
    storage = MappedStorage(durable=False)
    mapping = mmap.mmap(-1, 2**20)
    storage.adopt(mapping)
    tensors = {"a": torch.randn(3_000_000), "b": allocate((3_000_000,), torch.float32).fill_(7)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    write_tensors(tmp_path / "copy", tensors, storage=storage)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (300, 70)])
def test_allocated_memory_is_writable_and_shaped(shape: tuple[int, ...]) -> None:
    tensor = allocate(shape, torch.bfloat16)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (torch.Size(shape), torch.bfloat16, True)
    assert (tensor.fill_(3) == 3).all()


@pytest.mark.slow
def test_memory_stays_below_the_largest_block_in_fp32_and_a_little(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--blocks", "5", "--folder", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=230)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) > 5
