"""How fast a shard gets from memory to the disk, beside everything else that writes it.

    python benchmarks/bench_write.py [--size-gb 1] [--folder DIR] [--rounds 7] [--only durable,...]

The folder must lie on the disk to be measured. "Durable" means that the bytes are on the disk when the call
returns. What is measured and how: `benchmarks/paired.py`.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from paired import compare, run_apart, table
from safetensors.torch import load_file, save_file

from sharded_ckpt.checkpoint.publish import transaction

Tensors = dict[str, torch.Tensor]

BLOCK = 8 << 20

_PRIVATE_POPULATED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE


def main() -> None:
    """Run the comparisons that were asked for and print their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gb", type=float, default=1.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="durable,quick,export,hashed")
    parser.add_argument("--share", type=float, default=0.9, help="of a processor, that a fair run has had")
    options = parser.parse_args()
    tensors = make_tensors(options.size_gb)
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / "run"
        check(folder, tensors)
        for name in options.only.split(","):
            methods = {text: partial(method, folder, tensors) for text, method in COMPARISONS[name].items()}
            prepare = partial(make_ready, folder, round(options.size_gb * 2e9))
            measures = compare(methods, options.rounds, prepare=prepare, touch=False, share=options.share)
            print(table(f"{name}: {size:.2f} GB of bf16 tensors in anonymous memory", measures), flush=True)


def make_tensors(size_gb: float) -> Tensors:
    """Return blocks of a decoder in bf16, of random bits: nothing on the way may profit from zeros."""
    hidden, width = 2048, 8192
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden), "norm": (hidden,)}
    shapes |= {
        "mlp.up_proj": (width, hidden),
        "mlp.gate_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    tensors: Tensors = {}
    generator, total = torch.Generator().manual_seed(0), 0
    while total < size_gb * 1e9:
        layer = len(tensors) // len(shapes)
        for name, shape in shapes.items():
            bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
            tensors[f"model.layers.{layer}.{name}.weight"] = bits.view(torch.bfloat16)
            total += bits.nbytes
    return tensors


def check(folder: Path, tensors: Tensors) -> None:
    """Read back what we write, before any time is taken."""
    empty(folder)
    ours(folder, tensors)
    (file,) = (folder / "out").glob("*.safetensors")
    read = load_file(file)
    if not all(
        torch.equal(read[name].view(torch.int16), tensors[name].view(torch.int16)) for name in tensors
    ):
        sys.exit("what was read is not what was written")


def empty(folder: Path) -> None:
    """Make the folder new, with nothing left to write back."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()


def make_ready(folder: Path, nbytes: int) -> None:
    """Empty the folder, and touch as much free memory as the page cache will want.

    A virtual machine may have handed its free memory back to the host (free page reporting); whoever writes
    through the page cache would pay for getting it again, three times what the writing takes.
    """
    empty(folder)
    run_apart(lambda: {"touched": len(mmap.mmap(-1, nbytes, flags=_PRIVATE_POPULATED))})


def sync(*paths: Path) -> None:
    """Wait until files or folders are on the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


# Methods


def ours(folder: Path, tensors: Tensors, *, durable: bool = True, manifest: bool = False) -> Tensors:
    """Save through a transaction: shard, index, syncs, rename."""
    with transaction(folder / "out", durable=durable, manifest=manifest) as save:
        save.write_tensors(tensors)
    return {}


def safetensors_alone(folder: Path, tensors: Tensors) -> Tensors:
    """Save by the safetensors library: one file, no index, nothing waits for the disk."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {}


def safetensors_synced(folder: Path, tensors: Tensors) -> Tensors:
    """Save by the safetensors library, then wait for the disk."""
    safetensors_alone(folder, tensors)
    sync(folder / "model.safetensors", folder)
    return {}


def raw_direct(folder: Path, tensors: Tensors) -> Tensors:
    """Write as many bytes of one hot buffer around the page cache, by 8 threads: what the disk takes."""
    total = sum(tensor.nbytes for tensor in tensors.values()) // BLOCK * BLOCK
    fd = os.open(folder / "raw", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
    os.posix_fallocate(fd, 0, total)
    buffer = memoryview(mmap.mmap(-1, BLOCK))
    buffer[:] = os.urandom(1 << 20) * (BLOCK >> 20)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda offset: os.pwrite(fd, buffer, offset), range(0, total, BLOCK)))
    os.fsync(fd)
    os.close(fd)
    return {}


def dcp_export(folder: Path, tensors: Tensors) -> Tensors:
    """Save by torch.distributed.checkpoint in Hugging Face's layout: written, read and written again."""
    writer = dcp.HuggingFaceStorageWriter(
        str(folder / "out"), dict.fromkeys(tensors, 1), save_distributed=True, enable_consolidation=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    sync(*(folder / "out").rglob("*.safetensors"), folder / "out")
    return {}


COMPARISONS = {
    "durable": {
        "ours": ours,
        "safetensors.save_file + fsync": safetensors_synced,
        "raw O_DIRECT writes, 8 threads": raw_direct,
    },
    "quick": {
        "ours, durable=False": partial(ours, durable=False),
        "safetensors.save_file": safetensors_alone,
    },
    "export": {"ours": ours, "DCP HF export, consolidated, + fsync": dcp_export},
    "hashed": {"ours": ours, "ours with a manifest": partial(ours, manifest=True)},
}


if __name__ == "__main__":
    main()
