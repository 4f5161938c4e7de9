"""The pictures of the documentation. `python tests/support/pictures.py` draws them anew into docs/images."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from patchers.block_config import BlockConfig
from sharded_ckpt.demo.published_kind import published_kind
from sharded_ckpt.ownership import OwnershipPlan, plan_ownership
from sharded_ckpt.plots import plot_blocks, plot_plan, plot_reads
from sharded_ckpt.plots.drawing import new_figure
from sharded_ckpt.report.file_reads import file_reads
from sharded_ckpt.report.model_blocks import model_blocks

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
"""The sizes of SmolLM2-135M."""


def pictures() -> Iterator[tuple[str, Figure]]:
    """Draw each picture of the documentation, and give it with its name."""
    child = {**SMOLLM2, "per_layer_config": {str(index): said for index, said in _pruned().items()}}
    yield "blocks", _blocks_of(model_blocks(child))
    large = published_kind(162)
    plan, even = (plan_ownership(large, 8, split=split) for split in ("min-max", "even"))  # type: ignore[arg-type]
    yield "plan", plot_plan(model_blocks(large), plan, even, name="162 blocks over 8 ranks, by bytes")
    yield "reads", _reads_of(plan_ownership(SMOLLM2, 3))


def _pruned() -> dict[int, dict[str, object]]:
    narrow = {index: {"intermediate_size": 768} for index in (4, 5, 13, 14, 15, 22)}
    fewer = {index: {"num_key_value_heads": 1} for index in (9, 10, 11)}
    gone = {index: {"skip": ["attention"]} for index in (17, 18, 24)} | {20: {"skip": ["mlp"]}}
    return {**narrow, **fewer, **gone, 26: {"skip": ["attention", "mlp"]}}


def _blocks_of(blocks: list[BlockConfig | None]) -> Figure:
    figure = new_figure(7.4, 2.4)
    plot_blocks(blocks, ax=figure.subplots())
    return figure


def _reads_of(plan: OwnershipPlan) -> Figure:
    figure = new_figure(7.4, 2.6)
    with tempfile.TemporaryDirectory() as folder:
        files = file_reads(_smollm2(Path(folder)), plan)
    plot_reads(files, ax=figure.subplots())
    return figure


def _smollm2(folder: Path) -> Path:
    from support.hollow import hollow_checkpoint

    block = {
        "input_layernorm": [576],
        "mlp.down_proj": [576, 1536],
        "mlp.gate_proj": [1536, 576],
        "mlp.up_proj": [1536, 576],
        "post_attention_layernorm": [576],
        "self_attn.k_proj": [192, 576],
        "self_attn.o_proj": [576, 576],
        "self_attn.q_proj": [576, 576],
        "self_attn.v_proj": [192, 576],
    }
    shapes = {"model.embed_tokens.weight": [49152, 576]}
    for index in sorted(range(30), key=str):  # in files, blocks stand in the order of their names
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()}
    return hollow_checkpoint(folder, {**shapes, "model.norm.weight": [576]}, SMOLLM2, shards=5)


def write(folder: Path) -> list[Path]:
    """Draw all pictures into a folder."""
    written = []
    for name, figure in pictures():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=100, pil_kwargs={"optimize": True})
    return written


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    IMAGES.mkdir(exist_ok=True)
    write(IMAGES)
