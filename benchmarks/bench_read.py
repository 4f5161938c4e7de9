"""How fast tensors of some blocks are read, beside everything else that reads them.

    python benchmarks/bench_read.py [--size-gb 4] [--folder DIR] [--rounds 5] [--only warm,cold,keys,...]

Peers that are not installed are left out: `pip install fastsafetensors runai-model-streamer instanttensor`.
The folder must lie on a disk for the cold figures. What is measured and how: `benchmarks/paired.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from paired import Method, compare, evict, run_apart, table, warm
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as dcp_load
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig
from transformers.models.llama import modeling_llama as modeling_llama
from transformers.models.mixtral import modeling_mixtral as modeling_mixtral
from transformers.utils import logging as transformers_logging

import sharded_ckpt.checkpoint.transfer
import sharded_ckpt.loading.opening  # noqa: F401  # what the verbs import only when they are called
from sharded_ckpt import load_and_shard_model
from sharded_ckpt.checkpoint.index import CheckpointIndex
from sharded_ckpt.checkpoint.ranges import coalesce, cut
from sharded_ckpt.checkpoint.reader import open_checkpoint

MiB = 2**20
_BLOCK = re.compile(r"model\.layers\.(\d+)\.")


def main() -> None:
    """Run the benchmarks that were asked for and print their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gb", type=float, default=4)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--share", type=float, default=0.9, help="discard rounds in which a run had less of a core"
    )
    parser.add_argument("--only", default="warm,cold,experts,keys,plan,cast,fuse")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(min(4, os.cpu_count() or 1))
    benches = {
        "warm": bench_warm,
        "cold": bench_cold,
        "experts": bench_experts,
        "cast": bench_cast,
        "fuse": bench_fuse,
    }
    small = {"keys": bench_keys, "plan": bench_plan}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for name in options.only.split(","):
            for text in benches[name](folder, options) if name in benches else small[name](folder, options):
                print(text, flush=True)


# Checkpoints


def make_dense(folder: Path, size_gb: float) -> Path:
    """Write a bf16 llama of about that size, once, one shard of six blocks at a time."""
    hidden, width, vocabulary = 2048, 8192, 32000
    per_layer = 2 * (4 * hidden**2 + 3 * hidden * width)
    layers = max(4, round((size_gb * 1e9 - 4 * vocabulary * hidden) / per_layer))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=vocabulary,
        dtype="bfloat16",
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    shapes = {
        **{f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"},
        **{f"mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")},
        "mlp.down_proj.weight": (hidden, width),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    ends = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    blocks = [{f"model.layers.{i}.{name}": shape for name, shape in shapes.items()} for i in range(layers)]
    groups = [
        {key: shape for block in blocks[i : i + 6] for key, shape in block.items()}
        for i in range(0, layers, 6)
    ]
    groups[-1] |= {**ends, "model.norm.weight": (hidden,)}
    return write_shards(folder / f"dense-{size_gb:g}", groups, config)


def make_mixtral(folder: Path, size_gb: float) -> Path:
    """Write a bf16 mixtral of about that size with one tensor per expert, as published, a shard a block."""
    hidden, width, experts = 1024, 2048, 8
    shapes = {f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
    shapes |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes["block_sparse_moe.gate.weight"] = (experts, hidden)
    for number in range(experts):
        prefix = f"block_sparse_moe.experts.{number}"
        shapes |= {f"{prefix}.{name}.weight": (width, hidden) for name in ("w1", "w3")}
        shapes[f"{prefix}.w2.weight"] = (hidden, width)
    per_layer = 2 * sum(math.prod(shape) for shape in shapes.values())
    layers = max(4, round(size_gb * 1e9 / per_layer) // 2 * 2)
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_local_experts=experts,
        dtype="bfloat16",
        architectures=["MixtralForCausalLM"],
    )
    groups = [{f"model.layers.{i}.{name}": shape for name, shape in shapes.items()} for i in range(layers)]
    ends = {"model.embed_tokens.weight": (32000, hidden), "lm_head.weight": (32000, hidden)}
    groups.append({**ends, "model.norm.weight": (hidden,)})
    return write_shards(folder / f"mixtral-{size_gb:g}", groups, config)


def make_experts(folder: Path, layers: int, experts: int, shape: tuple[int, int], shards: int) -> Path:
    """Write the experts of a mixture, one tensor each, spread over shards in order."""
    keys = [
        f"model.layers.{i}.mlp.experts.{j}.{name}_proj.weight"
        for i in range(layers)
        for j in range(experts)
        for name in ("gate", "up", "down")
    ]
    size = -(-len(keys) // shards)
    groups = [dict.fromkeys(keys[i : i + size], shape) for i in range(0, len(keys), size)]
    return write_shards(folder / f"experts-{layers}-{experts}-{shape[0]}-{shards}", groups, None)


def write_shards(
    folder: Path, groups: list[dict[str, tuple[int, ...]]], config: PreTrainedConfig | None
) -> Path:
    """Write random bf16 tensors, a file for each group, unless they are there."""
    if not (folder / "model.safetensors.index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        run_apart(lambda: _write_shards(folder, groups, config))
    return folder


def _write_shards(
    folder: Path, groups: list[dict[str, tuple[int, ...]]], config: PreTrainedConfig | None
) -> dict[str, int]:
    weight_map, total = {}, 0
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {key: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for key, shape in group.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if config is not None:
        config.save_pretrained(folder)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"nbytes": total}


def owned(index: Iterable[str], part: float) -> list[str]:
    """Return the keys of the first part of the blocks, and the embedding."""
    numbers = [int(match[1]) for key in index if (match := _BLOCK.match(key))]
    limit = (max(numbers) + 1) * part
    return [
        key
        for key in index
        if (int(match[1]) < limit if (match := _BLOCK.match(key)) else key.endswith("embed_tokens.weight"))
    ]


# Methods: each gives the tensors of the owned part


class Methods:
    """Everything that reads the owned part of one checkpoint."""

    def __init__(self, folder: Path, part: float) -> None:
        self.folder, self.part = folder, part
        self.weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        self.keys = owned(self.weight_map, part)
        self.files = [folder / name for name in sorted(set(self.weight_map.values()))]

    def wanted(self, index: CheckpointIndex) -> list[str]:
        """Choose the owned keys."""
        return self.keys

    def reader(self) -> Iterable[torch.Tensor]:
        """Map them."""
        return open_checkpoint(self.folder).read(self.keys).values()

    def reader_alone(self) -> Iterable[torch.Tensor]:
        """Map them and read nothing ahead."""
        return open_checkpoint(self.folder).read(self.keys, read_ahead=False).values()

    def reader_copied(self) -> Iterable[torch.Tensor]:
        """Copy them."""
        return open_checkpoint(self.folder).read(self.keys, materialize=True).values()

    def loader(self) -> Iterable[torch.Tensor]:
        """The whole way to a model, as a user goes it."""
        layers = 1 + max(int(match[1]) for key in self.weight_map if (match := _BLOCK.match(key)))
        model = load_and_shard_model("auto", self.folder, set(range(int(layers * self.part))))
        return [parameter for parameter in model.parameters() if not parameter.is_meta]

    def from_pretrained(self) -> Iterable[torch.Tensor]:
        """The whole model, by transformers."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).parameters()

    def safe_open(self) -> Iterable[torch.Tensor]:
        """The owned tensors, by safetensors."""
        return list(self._safe_open())

    def _safe_open(self) -> Iterator[torch.Tensor]:
        groups: dict[str, list[str]] = {}
        for key in self.keys:
            groups.setdefault(self.weight_map[key], []).append(key)
        for name, group in groups.items():
            with safe_open(self.folder / name, framework="pt") as file:
                yield from [file.get_tensor(key) for key in group]

    def list_look_up(self) -> Iterable[torch.Tensor]:
        """Every key of every shard looked up in a list, as in puzzletron."""
        tensors, wanted = [], list(self.keys)
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                tensors += [file.get_tensor(key) for key in file.keys() if key in wanted]  # noqa: SIM118
        return tensors

    def dcp(self) -> Iterable[torch.Tensor]:
        """The owned tensors, by torch's distributed checkpoint."""
        entries = open_checkpoint(self.folder).headers(self.keys)
        tensors = {key: torch.empty(entry.shape, dtype=torch.bfloat16) for key, entry in entries.items()}
        dcp_load(
            tensors, storage_reader=HuggingFaceStorageReader(str(self.folder), thread_count=4), no_dist=True
        )
        return tensors.values()

    def fastsafetensors(self) -> Iterable[torch.Tensor]:
        """The owned tensors, by fastsafetensors."""
        from fastsafetensors import SafeTensorsFileLoader

        wanted = set(self.keys)
        loader = SafeTensorsFileLoader(None, "cpu", nogds=True, max_threads=16)
        loader.set_tensor_filter(lambda name: name in wanted)
        names = sorted({self.weight_map[key] for key in self.keys})
        loader.add_filenames({0: [str(self.folder / name) for name in names]})
        self.buffer = loader.copy_files_to_device()
        return [self.buffer.get_tensor(key) for key in self.keys]

    def runai(self) -> Iterable[torch.Tensor]:
        """The owned tensors, by the Run:ai streamer."""
        from runai_model_streamer import SafetensorsStreamer

        names = sorted({self.weight_map[key] for key in self.keys})
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(
                [str(self.folder / name) for name in names], device="cpu", tensor_names=self.keys
            )
            return [tensor for _, tensor in streamer.get_tensors()]

    def instanttensor(self) -> Iterable[torch.Tensor]:
        """The owned tensors, by InstantTensor; it says itself that it wants a GPU."""
        from instanttensor import safe_open as instant_open

        names = sorted({self.weight_map[key] for key in self.keys})
        with instant_open([str(self.folder / name) for name in names], framework="pt", device="cpu") as file:
            return [file.get_tensor(key) for key in self.keys]

    def raw_read(self) -> Iterable[torch.Tensor]:
        """No tensors: the same bytes read by eight threads, four MiB at a time, into one buffer each."""
        buffers, jobs = threading.local(), []
        for shard, items in open_checkpoint(self.folder, self.wanted).plan(self.keys):
            ranges = coalesce((entry.begin, entry.end) for _, entry in items)
            jobs += [(os.dup(shard.fileno()), begin, end) for begin, end in cut(ranges, 4 * MiB)]

        def read(job: tuple[int, int, int]) -> None:
            fd, begin, end = job
            if not hasattr(buffers, "memory"):
                buffers.memory = memoryview(bytearray(4 * MiB))
            os.preadv(fd, [buffers.memory[: end - begin]], begin)
            os.close(fd)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, jobs))
        return []


def peers(methods: Methods) -> dict[str, Method]:
    """Return the optional peers that are installed."""
    modules = {
        "fastsafetensors": methods.fastsafetensors,
        "runai_model_streamer": methods.runai,
        "instanttensor": methods.instanttensor,
    }
    return {name: method for name, method in modules.items() if importlib.util.find_spec(name)}


# Benchmarks


def bench_warm(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Half and a quarter of the blocks, all in the page cache."""
    for part in (0.5, 0.25):
        methods = Methods(make_dense(folder, options.size_gb), part)
        warm(methods.files)
        title = f"warm, {part:g} of the blocks of {options.size_gb:g} GB"
        model = {"load_and_shard_model": methods.loader, "from_pretrained, whole": methods.from_pretrained}
        yield table(f"{title}: to a model", compare(model, options.rounds, share=options.share))
        tensors = {
            "reader": methods.reader,
            "safe_open through the index": methods.safe_open,
            "list look-up": methods.list_look_up,
            "reader, materialize": methods.reader_copied,
            "DCP, 4 threads": methods.dcp,
            **peers(methods),
        }
        yield table(f"{title}: to tensors", compare(tensors, options.rounds, share=options.share))


def bench_experts(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Half of the blocks of a mixture, its experts fused on the way to the model."""
    methods = Methods(make_mixtral(folder, options.size_gb), 0.5)
    warm(methods.files)
    cases = {"load_and_shard_model": methods.loader, "from_pretrained, whole": methods.from_pretrained}
    own = sum(entry.nbytes for entry in open_checkpoint(methods.folder).headers(methods.keys).values())
    title = f"warm, half of the blocks of a mixtral of {options.size_gb:g} GB ({own / MiB:.0f} MiB)"
    yield table(title, compare(cases, options.rounds, share=options.share))


def bench_cold(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Half of the blocks, nothing in the page cache."""
    methods = Methods(make_dense(folder, options.size_gb), 0.5)
    cases = {
        "raw read, 8 threads (the limit)": methods.raw_read,
        "reader": methods.reader,
        "reader, read_ahead=False": methods.reader_alone,
        "reader, materialize": methods.reader_copied,
        "load_and_shard_model": methods.loader,
        "safe_open through the index": methods.safe_open,
        "from_pretrained, whole": methods.from_pretrained,
        "DCP, 4 threads": methods.dcp,
        **peers(methods),
    }
    os.sync()
    found = compare(cases, options.rounds, share=options.share, prepare=lambda: evict(methods.files))
    yield table(f"cold, half of the blocks of {options.size_gb:g} GB", found)


def bench_keys(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """A quarter of 21,000 tensors in 20 shards."""
    methods = Methods(make_experts(folder, layers=54, experts=130, shape=(128, 128), shards=20), 0.25)
    warm(methods.files)
    cases = {
        "reader": methods.reader,
        "safe_open through the index": methods.safe_open,
        "list look-up": methods.list_look_up,
    }
    title = f"warm, {len(methods.keys)} of {len(methods.weight_map)} keys in {len(methods.files)} shards"
    found = compare(cases, options.rounds, share=options.share, touch=False)
    per_key = min(found["reader"].load, default=0) / len(methods.keys) * 1e6
    yield table(f"{title}, untouched", found) + f"\n{per_key:.1f} us a key at best.\n"


def bench_plan(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """The plan over 100,000 tensors in 120 shards."""
    methods = Methods(make_experts(folder, layers=128, experts=261, shape=(4, 4), shards=120), 1)

    def plan() -> Iterable[torch.Tensor]:
        open_checkpoint(methods.folder).plan()
        return []

    def every_header() -> Iterable[torch.Tensor]:
        for path in methods.files:
            with safe_open(path, framework="pt") as file:
                file.keys()
        return []

    title = f"plan over {len(methods.weight_map)} keys in {len(methods.files)} shards"
    yield table(
        title,
        compare(
            {"plan": plan, "safe_open().keys()": every_header},
            options.rounds,
            share=options.share,
            touch=False,
        ),
    )


def bench_cast(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """A quarter of the blocks as float32."""
    methods = Methods(make_dense(folder, options.size_gb), 0.25)
    warm(methods.files)
    cases: dict[str, Callable[[], Iterable[torch.Tensor]]] = {
        "reader, dtype": lambda: (
            open_checkpoint(methods.folder).read(methods.keys, dtype=torch.float32).values()
        ),
        "safe_open, then to": lambda: [tensor.float() for tensor in methods.safe_open()],
    }
    yield table(
        "warm, a quarter of the blocks to float32", compare(cases, options.rounds, share=options.share)
    )


def bench_fuse(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Experts fused block by block."""
    experts, shape = 64, (768, 1024)
    layers = max(2, int(options.size_gb * 1e9 / (experts * 3 * shape[0] * shape[1] * 2)))
    methods = Methods(make_experts(folder, layers, experts, shape, shards=layers), 0.5)
    warm(methods.files)

    def fuse(pairs: Callable[[list[str]], Iterable[tuple[str, torch.Tensor]]]) -> list[torch.Tensor]:
        fused = []
        for layer in range(layers // 2):
            keys = [key for key in methods.keys if key.startswith(f"model.layers.{layer}.")]
            block = torch.empty(len(keys), *shape, dtype=torch.bfloat16)
            places = {key: place for place, key in enumerate(keys)}
            for key, tensor in pairs(keys):
                block[places[key]] = tensor
            fused.append(block)
        return fused

    def one_by_one() -> list[torch.Tensor]:
        return fuse(open_checkpoint(methods.folder).iter_tensors)

    def all_at_once() -> list[torch.Tensor]:
        tensors = dict(zip(methods.keys, methods.safe_open(), strict=True))
        return fuse(lambda keys: [(key, tensors[key]) for key in keys])

    title = f"warm, half of {layers} blocks of {experts} experts, fused"
    cases = {"iter_tensors": one_by_one, "safe_open, all at once": all_at_once}
    yield table(title, compare(cases, options.rounds, share=options.share))


if __name__ == "__main__":
    main()
