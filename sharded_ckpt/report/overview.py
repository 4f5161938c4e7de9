"""A checkpoint at a glance: its blocks, its tensors, what does not fit. From headers and config alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from patchers.block_config import BlockConfig
from patchers.block_words import attention_words, block_dict, ffn_words
from patchers.dialects import detect_dialect
from patchers.names import fold_indices
from patchers.tables import Page, Table, amount, as_html, as_text
from sharded_ckpt.checkpoint.garbage import paused_collection
from sharded_ckpt.checkpoint.reader import open_checkpoint
from sharded_ckpt.checkpoint.shard_names import SHARD
from sharded_ckpt.checkpoint.source import find_config
from sharded_ckpt.report.block_kinds import Kinds, infer_kinds, main_stack, text_config
from sharded_ckpt.report.tensor_groups import TensorGroup, group_tensors


@dataclass(frozen=True)
class BlockRow:
    """One block of a checkpoint.

    Attributes:
        stack: Where the blocks are: `model.layers`.
        index: Of the block there.
        config: What its tensors are; None where they do not tell, or for blocks beside the language model.
        parameters: Elements of its tensors.
        nbytes: Bytes of its tensors.
        files: The files that hold them.
    """

    stack: str
    index: int
    config: BlockConfig | None
    parameters: int
    nbytes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointOverview:
    """What is in a checkpoint. Printed, it is text; in a notebook, tables.

    Attributes:
        location: Where it is.
        family: The `model_type` of its config.
        dialect: In which the config says its blocks; None if it says nothing of single ones.
        files: The files that hold tensors.
        tensors: Number of tensors.
        parameters: Elements of all tensors.
        nbytes: Bytes of all tensors.
        dtypes: Bytes of the tensors of each dtype.
        stack: Where the blocks of the language model are, such as `model.layers`.
        blocks: All blocks, one after the other.
        groups: All tensors, names folded.
        notes: What is odd: blocks whose tensors do not tell what they are, or contradict the config.
    """

    location: str
    family: str | None
    dialect: str | None
    files: tuple[str, ...]
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    stack: str | None
    blocks: tuple[BlockRow, ...]
    groups: tuple[TensorGroup, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return as_text(self.page)

    def _repr_html_(self) -> str:
        return as_html(self.page)

    @property
    def page(self) -> Page:
        """What it looks like."""
        notes = [f"note: {note}" for note in self.notes]
        tables = [Table(rows) for rows in (self._block_rows(), self._tensor_rows()) if len(rows) > 1]
        return ["\n".join([self.title, *notes]), *tables]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        said = [None if row.config is None else block_dict(row.config) for row in self.blocks]
        rows = [{**vars(row), "config": config} for row, config in zip(self.blocks, said, strict=True)]
        return {**vars(self), "blocks": rows, "groups": [group.to_dict() for group in self.groups]}

    @property
    def title(self) -> str:
        """What it is, in two lines."""
        kinds = ", ".join(f"{dtype} {amount(size, 'bytes')}" for dtype, size in self.dtypes.items())
        blocks = f"blocks said in {self.dialect}" if self.dialect else "no block configs"
        parameters = f"{amount(self.parameters, 'parameters')} parameters in {self.tensors} tensors"
        size = f"{amount(self.nbytes, 'bytes')} in {len(self.files)} file{'s'[: len(self.files) != 1]}"
        return f"{self.location}: {self.family or 'no config'}, {blocks}\n{parameters}, {size} ({kinds})"

    def _block_rows(self) -> list[list[str]]:
        several = len({row.stack for row in self.blocks}) > 1
        rows = [["block", "attention", "FFN", "parameters", "bytes", "shards"]]
        for row in self.blocks:
            name = f"{row.stack}.{row.index}" if several else str(row.index)
            sizes = [amount(row.parameters, "parameters"), amount(row.nbytes, "bytes")]
            rows.append(
                [name, attention_words(row.config), ffn_words(row.config), *sizes, _shards(row.files)]
            )
        return rows

    def _tensor_rows(self) -> list[list[str]]:
        rows = [["tensors", "dtype", "shape", "number", "bytes"]]
        for group in self.groups:
            shape = " x ".join(map(str, group.shape)) or "scalar"
            rows.append([group.name, group.dtype, shape, str(group.count), amount(group.nbytes, "bytes")])
        return rows


def overview(checkpoint: str | os.PathLike[str], **options: Any) -> CheckpointOverview:
    """Look into a checkpoint: headers and config are read, no weights.

    Args:
        checkpoint: A directory, a file in it, a hub id, or a URL.
        **options: Those of `open_source`, for hub ids.

    Raises:
        CheckpointNotFoundError: There is nothing at that place.
        CheckpointError: The files are broken.

    Example:
        >>> overview(checkpoint).blocks[1].config.attention  # the path of a checkpoint
        AttentionConfig(num_key_value_heads=2)
    """
    with paused_collection():
        reader = open_checkpoint(checkpoint, lambda index: index, **options)
        groups = group_tensors((shard.name, items) for shard, items in reader.plan())
        source = reader.source
        reader.close()
    config = find_config(source) or {}
    stack, blocks, notes = _blocks(groups, config)
    dtypes: dict[str, int] = {}
    for group in groups:
        dtypes[group.dtype] = dtypes.get(group.dtype, 0) + group.nbytes
    dialect = detect_dialect(config)
    return CheckpointOverview(
        source.location,
        config.get("model_type"),
        None if dialect is None else dialect.value,
        reader.index.files,
        len(reader.index),
        sum(group.count * group.elements for group in groups),
        sum(group.nbytes for group in groups),
        dtypes,
        stack,
        blocks,
        tuple(groups),
        notes,
    )


def _blocks(
    groups: Sequence[TensorGroup], config: Mapping[str, Any]
) -> tuple[str | None, tuple[BlockRow, ...], tuple[str, ...]]:
    stacks: dict[str, list[TensorGroup]] = {}
    for group in groups:
        if group.stack is not None:
            stacks.setdefault(group.stack, []).append(group)
    kinds: Kinds = {}
    notes: list[str] = []
    language_model = text_config(config)
    main = main_stack(groups, language_model)
    if language_model is None:
        notes = ["there is no config.json that says the number of blocks, so their kinds are not known"]
    elif main is not None:
        kinds, notes = infer_kinds(main, stacks[main], language_model)
    rows = [row for name, of in stacks.items() for row in _rows(name, of, kinds if name == main else {})]
    return main, tuple(rows), tuple(notes)


def _rows(stack: str, groups: Sequence[TensorGroup], kinds: Kinds) -> Iterator[BlockRow]:
    parameters: Counter[int] = Counter()
    nbytes: Counter[int] = Counter()
    files: dict[int, set[str]] = {}
    for group in groups:
        for file, numbers in group.numbers.items():
            for block, count in Counter(map(itemgetter(group.block_position), numbers)).items():
                parameters[int(block)] += count * group.elements
                nbytes[int(block)] += count * group.size
                files.setdefault(int(block), set()).add(file)
    for index in sorted({*files, *kinds}):
        held_by = tuple(sorted(files.get(index, ())))
        yield BlockRow(stack, index, kinds.get(index), parameters[index], nbytes[index], held_by)


def _shards(files: Iterable[str]) -> str:
    """Show shards by their numbers, other files by their names."""
    matches = {file: SHARD.fullmatch(file) for file in files}
    numbers = fold_indices(int(match["number"]) for match in matches.values() if match)
    return ", ".join(
        [*([numbers] if numbers else []), *(file for file, match in matches.items() if not match)]
    )
