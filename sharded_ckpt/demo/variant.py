"""A heterogeneous variant of a checkpoint: some blocks without attention, others without FFN.

Config and keys only. The variant's config.json says which sub-blocks are gone, its index names the tensors
that are left, and its safetensors files are links to those of the parent: not a byte of weights is written.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig
from patchers.dialects import Dialect, write_block_configs
from patchers.names import fold_indices
from sharded_ckpt.checkpoint.index import INDEX_FILE
from sharded_ckpt.checkpoint.reader import CheckpointReader, open_checkpoint

from .cache import RECORD, cached_folder

_LAYOUT = 1  # raised whenever the same parent would give another folder
_OWN_FILES = frozenset({"config.json", INDEX_FILE, "README.md", RECORD})
_README = """\
{parent} without {dropped}.
The other tensors are the parent's own: the safetensors files here are links to its files.
Made by the demo of sharded-ckpt; delete the folder at will, it is made again when needed.
"""


@dataclass(frozen=True)
class Dropped:
    """The sub-blocks that a variant goes without.

    Attributes:
        attention: Blocks without attention and its norm.
        ffn: Blocks without FFN and its norm.

    Example:
        >>> str(Dropped(attention=(15, 17, 18), ffn=(12,)))
        'the attention of blocks 15,17-18 and the FFN of block 12'
    """

    attention: tuple[int, ...] = ()
    ffn: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = (("attention", self.attention), ("FFN", self.ffn))
        return " and ".join(f"the {name} of {blocks_text(gone)}" for name, gone in parts if gone)

    def block(self, index: int) -> BlockConfig:
        """Return what is left of a block."""
        return BlockConfig(AttentionConfig(no_op=index in self.attention), FFNConfig(no_op=index in self.ffn))


def variant_folder(parent: Path, folder: Path, dropped: Dropped) -> Path:
    """Return a checkpoint folder of the parent without some sub-blocks, which the first call makes.

    Its config.json carries the block configs in the AnyModel dialect.

    Args:
        parent: A Hugging Face folder that the demo made.
        folder: Where the variant shall be, best on the same file system.
        dropped: What to leave out.

    Raises:
        ConfigError: Something else is at `folder`.
        CheckpointError: The parent's files are broken.
    """
    made_from = json.loads((parent / RECORD).read_text())["recipe"]
    recipe = {"layout": _LAYOUT, "parent": made_from, "dropped": asdict(dropped)}
    plain = json.loads(json.dumps(recipe))  # tuples as they come back from the record
    return cached_folder(folder, plain, lambda stage: _make(parent, stage, dropped))


def blocks_text(indices: tuple[int, ...]) -> str:
    """Return the blocks as a sentence has them.

    Example:
        >>> blocks_text((3,)), blocks_text((3, 4, 5))
        ('block 3', 'blocks 3-5')
    """
    return f"block{'s' if len(indices) > 1 else ''} {fold_indices(indices)}"


def _make(parent: Path, folder: Path, dropped: Dropped) -> None:
    for file in parent.iterdir():
        if file.is_file() and file.name not in _OWN_FILES:
            _link(file, folder / file.name)
    raw = json.loads((parent / "config.json").read_text())
    blocks = [dropped.block(index) for index in range(raw["num_hidden_layers"])]
    _write_json(folder / "config.json", {**raw, **write_block_configs(blocks, Dialect.ANYMODEL, raw)})
    reader = open_checkpoint(parent)
    _write_json(folder / INDEX_FILE, _index(reader, _wanted_by(parent, blocks)))
    reader.close()
    (folder / "README.md").write_text(_README.format(parent=parent.name, dropped=dropped))


def _wanted_by(parent: Path, blocks: list[BlockConfig]) -> set[str]:
    """Return the tensor names of the native model with these blocks, built on meta."""
    from patchers.descriptor import ModelDescriptor
    from sharded_ckpt.config import load_model_config
    from sharded_ckpt.model import build_skeleton

    config = load_model_config(parent)
    skeleton = build_skeleton(ModelDescriptor.from_config(config), config, block_configs=blocks)
    return set(skeleton.state_dict())


def _index(reader: CheckpointReader, wanted: set[str]) -> dict[str, Any]:
    kept = {key: file for key, file in reader.index.weight_map.items() if key in wanted}
    total = sum(entry.nbytes for entry in reader.headers(kept).values())
    return {"metadata": {"total_size": total}, "weight_map": kept}


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)  # stays whole when the parent is deleted
    except OSError:  # another file system, or one without hard links
        to.symlink_to(file.resolve())


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
