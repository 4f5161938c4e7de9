"""How two checkpoints differ: in config, in tensors, and block by block in values."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from patchers.block_words import attention_words, ffn_words
from patchers.dialects import CONFIG_FIELDS
from patchers.names import fold, split_block
from patchers.tables import Page, Table, as_html, as_text
from sharded_ckpt.checkpoint.entry import TensorEntry
from sharded_ckpt.checkpoint.reader import CheckpointReader, open_checkpoint
from sharded_ckpt.checkpoint.source import find_config
from sharded_ckpt.report.overview import CheckpointOverview, overview

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 22
_NOTHING = "nothing"


@dataclass(frozen=True)
class ValueDifference:
    """How the values of one block differ; of what is outside of blocks, those of one tensor.

    Attributes:
        name: The block, `model.layers.3`, or the tensor.
        tensors: How many tensors differ.
        compared: How many were compared: those of equal shape in both.
        largest: The largest difference of two values.
        relative: The norm of the difference over the norm of the first checkpoint's values.
    """

    name: str
    tensors: int
    compared: int
    largest: float
    relative: float


@dataclass(frozen=True)
class CheckpointDifference:
    """How two checkpoints differ. True if they do.

    Attributes:
        first: Where the one is.
        second: Where the other is.
        config: Fields of the config that differ, with both values; None where a config lacks it. The blocks,
            which can be said in many ways, are not among them.
        blocks: What their blocks are, by name, where that differs, told from their tensors.
        only_first: Tensors that only the first has.
        only_second: Tensors that only the second has.
        forms: Dtype and shape in both of tensors that differ in that, by name.
        values: Blocks with different values; None if they were not compared.
    """

    first: str
    second: str
    config: Mapping[str, tuple[Any, Any]]
    blocks: Mapping[str, tuple[str, str]]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    forms: Mapping[str, tuple[str, str]]
    values: tuple[ValueDifference, ...] | None

    def __bool__(self) -> bool:
        said = (self.config, self.blocks, self.only_first, self.only_second, self.forms, self.values)
        return any(said)

    def __str__(self) -> str:
        return as_text(self.page)

    def _repr_html_(self) -> str:
        return as_html(self.page)

    @property
    def page(self) -> Page:
        """What it looks like."""
        what = "blocks, tensors and values" if self.values is not None else "blocks and tensors"
        if not self:
            return [f"{self.first} and {self.second}: config, {what} are equal"]
        parts: list[str | Table] = [f"{self.first} and {self.second} differ"]
        parts += _tables("config", self.config) + _tables("block", self.blocks)
        parts += [f"only in {self.first}: {fold(self.only_first)}"] if self.only_first else []
        parts += [f"only in {self.second}: {fold(self.only_second)}"] if self.only_second else []
        return parts + _tables("tensors", _alike(self.forms)) + self._value_tables()

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data; JSON has no NaN and no infinity, which become texts."""
        said: dict[str, Any] = _comparable({"equal": not self, **asdict(self)})
        return said

    def _value_tables(self) -> list[Table]:
        if not self.values:
            return []
        rows = [["values of", "tensors", "largest", "relative"]]
        for found in self.values:
            sizes = [f"{found.largest:.3g}", f"{found.relative:.3g}"]
            rows.append([found.name, f"{found.tensors} of {found.compared}", *sizes])
        return [Table(rows)]


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    values: bool = True,
    progress: Callable[[int], object] | None = None,
) -> CheckpointDifference:
    """Compare two checkpoints.

    Args:
        first: A directory, a file in it, a hub id, or a URL.
        second: The same.
        values: Whether to read all tensors of equal shape and compare them; this imports torch. Different
            dtypes are compared as numbers.
        progress: Called with the bytes compared since the last call.

    Raises:
        CheckpointNotFoundError: There is nothing at one of the places.
        CheckpointError: Files are broken.
    """
    a, b = (open_checkpoint(place, lambda index: index) for place in (first, second))
    one, other = a.headers(), b.headers()
    common = [key for key in one if key in other]
    same_shape = [key for key in common if one[key].shape == other[key].shape]
    forms = {key: (_form(one[key]), _form(other[key])) for key in common}
    try:
        return CheckpointDifference(
            a.source.location,
            b.source.location,
            _config_difference(_config(a), _config(b)),
            _block_difference(overview(first), overview(second)),
            tuple(key for key in one if key not in other),
            tuple(key for key in other if key not in one),
            {key: pair for key, pair in forms.items() if pair[0] != pair[1]},
            _value_difference(a, b, same_shape, progress) if values else None,
        )
    finally:
        a.close()
        b.close()


def _config(reader: CheckpointReader) -> Mapping[str, Any]:
    config = find_config(reader.source) or {}
    return {name: value for name, value in config.items() if name not in CONFIG_FIELDS}


def _config_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = (name for name in {**a, **b} if _comparable(a.get(name)) != _comparable(b.get(name)))
    return {name: (a.get(name), b.get(name)) for name in names}


def _comparable(value: Any) -> Any:
    """Return plain data with NaN, which equals nothing, and infinities as texts."""
    if isinstance(value, dict):
        return {name: _comparable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _block_difference(a: CheckpointOverview, b: CheckpointOverview) -> dict[str, tuple[str, str]]:
    words = [
        {f"{row.stack}.{row.index}": f"{attention_words(row.config)}, {ffn_words(row.config)}" for row in of}
        for of in (a.blocks, b.blocks)
    ]
    names = {**words[0], **words[1]}
    pairs = {name: (words[0].get(name, _NOTHING), words[1].get(name, _NOTHING)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _value_difference(
    a: CheckpointReader,
    b: CheckpointReader,
    keys: Iterable[str],
    progress: Callable[[int], object] | None,
) -> tuple[ValueDifference, ...]:
    sums: dict[str, _Sums] = {}
    for key, tensor in a.iter_tensors(keys):
        ((_, other),) = b.iter_tensors([key])
        place = split_block(key)
        sums.setdefault(f"{place[0]}.{place[1]}" if place else key, _Sums()).add(tensor, other)
        if progress is not None:
            progress(tensor.nbytes)
    found = {name: total for name, total in sums.items() if total.tensors}
    return tuple(found[name].difference(name) for name in found)


class _Sums:
    """What adds up over the tensors of a block."""

    def __init__(self) -> None:
        self.tensors = self.compared = 0
        self.largest = self.squares = self.norm = 0.0

    def add(self, tensor: torch.Tensor, other: torch.Tensor) -> None:
        """Count in a tensor of both checkpoints."""
        from sharded_ckpt.checkpoint.raw import bytes_of

        self.compared += 1
        is_alike = tensor.dtype == other.dtype
        is_same = is_alike and bytes_of(tensor).equal(bytes_of(other))
        largest = 0.0
        for numbers, of_other in zip(_numbers(tensor), _numbers(other), strict=True):
            self.norm += float(numbers.square().sum())
            if not is_same:
                gap = (numbers - of_other).abs()
                largest = _larger(largest, float(gap.max()))
                self.squares += float(gap.square().sum())
        self.largest = _larger(self.largest, largest)
        # integers may differ by less than the numbers here can show
        self.tensors += largest != 0 or (is_alike and not is_same and not tensor.is_floating_point())

    def difference(self, name: str) -> ValueDifference:
        """Return what was added up."""
        relative = math.sqrt(self.squares / self.norm) if self.norm else math.inf
        return ValueDifference(name, self.tensors, self.compared, self.largest, relative)


def _numbers(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Give the values as fp64, some at a time; two packed ones of four bits count as one number."""
    import torch

    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    packed = tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None)
    for part in (tensor.view(torch.uint8) if packed else tensor).reshape(-1).split(_CHUNK):
        if part.numel():
            yield part.double()


def _larger(a: float, b: float) -> float:
    """Return the larger number, NaN if one is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _form(entry: TensorEntry) -> str:
    return f"{entry.dtype} {' x '.join(map(str, entry.shape)) or 'scalar'}"


def _alike(forms: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Fold the names of tensors that differ alike."""
    keys: dict[tuple[str, str], list[str]] = {}
    for key, pair in forms.items():
        keys.setdefault(pair, []).append(key)
    return {fold(of): pair for pair, of in keys.items()}


def _tables(what: str, pairs: Mapping[str, tuple[Any, Any]]) -> list[Table]:
    """Return a table of what differs, none if nothing does."""
    rows = [[name, str(a), str(b)] for name, (a, b) in pairs.items()]
    return [Table([[what, "first", "second"], *rows])] if rows else []
