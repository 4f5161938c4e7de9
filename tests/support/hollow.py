"""Checkpoints without weights: configs, indexes and headers, and files that are one hole. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.raw_files import file_bytes, header_json, write_index

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "dtype": "bfloat16",
}
"""Heads of 16."""


def llama_shapes(layers: int = 4, *, kv_heads: int = 2, width: int = 96) -> dict[str, list[int]]:
    """The tensors of a llama that `LLAMA` describes."""
    shapes = {"model.embed_tokens.weight": [128, 64], "model.norm.weight": [64], "lm_head.weight": [128, 64]}
    for index in range(layers):
        shapes |= attention_shapes(index, kv_heads) | ffn_shapes(index, width)
    return shapes


def attention_shapes(index: int, kv_heads: int) -> dict[str, list[int]]:
    """The attention of one block, and its norm."""
    sizes = {"q_proj": [64, 64], "k_proj": [16 * kv_heads, 64], "v_proj": [16 * kv_heads, 64]}
    block = f"model.layers.{index}"
    parts = {
        f"{block}.self_attn.{name}.weight": size for name, size in (sizes | {"o_proj": [64, 64]}).items()
    }
    return {f"{block}.input_layernorm.weight": [64], **parts}


def ffn_shapes(index: int, width: int) -> dict[str, list[int]]:
    """The FFN of one block, and its norm."""
    sizes = {"gate_proj": [width, 64], "up_proj": [width, 64], "down_proj": [64, width]}
    block = f"model.layers.{index}"
    parts = {f"{block}.mlp.{name}.weight": size for name, size in sizes.items()}
    return {f"{block}.post_attention_layernorm.weight": [64], **parts}


def without(shapes: Mapping[str, list[int]], *parts: str) -> dict[str, list[int]]:
    """Shapes less those of whose name a part is given."""
    return {name: shape for name, shape in shapes.items() if not any(part in name for part in parts)}


PRUNED = {
    "1": {"skip": ["attention"]},
    "2": {"intermediate_size": 48},
    "3": {"skip": ["attention", "mlp"]},
}


def pruned_shapes() -> dict[str, list[int]]:
    """Block 1 has no attention, block 2 half an FFN, block 3 nothing at all."""
    shapes = without(llama_shapes(), "layers.1.self_attn", "layers.1.input_layernorm", "layers.3.")
    return shapes | ffn_shapes(2, 48)


def pruned_checkpoint(folder: Path) -> Path:
    """A checkpoint of four blocks that are all different."""
    return hollow_checkpoint(folder, pruned_shapes(), {**LLAMA, "per_layer_config": PRUNED})


def hollow_checkpoint(
    folder: Path, shapes: Mapping[str, list[int]], config: Mapping[str, Any] | None = None, shards: int = 2
) -> Path:
    """Write a BF16 checkpoint whose every value is 0 and takes no room on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    items, weight_map, total = list(shapes.items()), {}, 0
    per_shard = -(-len(items) // shards)
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        rows, end = {}, 0
        for key, shape in items[number * per_shard : (number + 1) * per_shard]:
            begin, end = end, end + 2 * _product(shape)
            rows[key] = ("BF16", shape, [begin, end])
            weight_map[key] = name
        head = file_bytes(header_json(rows, format="pt"))
        with open(folder / name, "wb") as file:
            file.write(head)
            file.truncate(len(head) + end)
        total += end
    write_index(folder, weight_map, metadata={"total_size": total})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def _product(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
