"""How much memory it takes to make a child, and how long.

    python benchmarks/bench_child.py [--blocks 8] [--folder DIR]

The parent is a bf16 llama with an embedding and a head that are each larger than a block in fp32. Each run is
a fresh process that imports everything first. Its peak is VmHWM after a reset through
`/proc/self/clear_refs`, less the resident memory after the imports. Exits with 1 if a peak is above what is
promised: the largest block in fp32 (at least 64 MB) and 25 MB more.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from patchers import AttentionConfig, BlockConfig, FFNConfig, ModelDescriptor
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.checkpoint.writer import LazyTensor
from sharded_ckpt.children import init_child_from_parent

MB = 1e6
HIDDEN, WIDTH, HEADS, KV_HEADS, VOCABULARY = 1024, 8192, 16, 8, 128_000
BLOCK_PARAMETERS = 3 * HIDDEN * WIDTH + 2 * HIDDEN * HIDDEN * (HEADS + KV_HEADS) // HEADS + 2 * HIDDEN
BOUND = max(4 * BLOCK_PARAMETERS, 64 * MB) + 25 * MB

CHILDREN = {
    "the parent itself": BlockConfig(),
    "half of each FFN": BlockConfig(ffn=FFNConfig(WIDTH // 2)),
    "nearly all of each FFN": BlockConfig(ffn=FFNConfig(WIDTH - 8)),
    "a quarter of the KV heads": BlockConfig(AttentionConfig(KV_HEADS // 4)),
    "linear attentions and FFNs": BlockConfig(
        AttentionConfig(replace_with_linear=True), FFNConfig(replace_with_linear=True)
    ),
}


def make_parent(folder: Path, blocks: int) -> None:
    """Write a llama of normal numbers, tensor by tensor."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    kv = KV_HEADS * HIDDEN // HEADS
    for index in range(blocks):
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.gate_proj": (WIDTH, HIDDEN),
            "mlp.up_proj": (WIDTH, HIDDEN),
            "mlp.down_proj": (HIDDEN, WIDTH),
        }.items():
            shapes[f"model.layers.{index}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (HIDDEN,)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": blocks,
        "vocab_size": VOCABULARY,
    }
    with transaction(folder, durable=False) as save:
        save.write_tensors({name: normal(shape) for name, shape in shapes.items()}, max_shard_size="500MB")
        save.write_json("config.json", config)


def normal(shape: tuple[int, ...]) -> LazyTensor:
    """A tensor that is drawn when it is written."""
    return LazyTensor(torch.bfloat16, shape, lambda: torch.randn(shape, dtype=torch.bfloat16))


def status(field: str) -> int:
    """Return a memory figure of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def run(which: str, parent: Path, out: Path, queue: Any) -> None:
    """Make one child here, and say how much memory and time it took."""
    ModelDescriptor.from_family("llama")  # imports the modelling code, and probes it
    torch.ones(256, 256) @ torch.ones(256, 256)  # sets up the threads and buffers of the BLAS library
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = status("VmRSS"), time.perf_counter()
    blocks = json.loads((parent / "config.json").read_text())["num_hidden_layers"]
    report = init_child_from_parent(parent, [CHILDREN[which]] * blocks, out, progress=False)
    queue.put((status("VmHWM") - before, time.perf_counter() - started, report.nbytes))


def measure(which: str, parent: Path, out: Path) -> tuple[int, float, int]:
    """Make one child in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=run, args=(which, parent, out, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the process that makes {which} ended with {process.exitcode}")
    result: tuple[int, float, int] = queue.get()
    return result


def main() -> int:
    """Measure each child once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where to work, a temporary directory by default")
    options = parser.parse_args()
    worst = 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        parent = Path(folder) / "parent"
        make_parent(parent, options.blocks)
        print(f"promised: at most {BOUND / MB:.0f} MB over the state after the imports")
        print(f"{'child':28} {'peak MB':>8} {'seconds':>8} {'GB':>6}")
        for number, which in enumerate(CHILDREN):
            peak, seconds, nbytes = measure(which, parent, Path(folder) / f"child{number}")
            print(f"{which:28} {peak / MB:8.0f} {seconds:8.1f} {nbytes / 1e9:6.2f}")
            worst = max(worst, peak)
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
