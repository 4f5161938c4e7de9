"""A checkpoint in pickle format, for those who asked for it, behind the face of the safetensors reader."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from sharded_ckpt.checkpoint.entry import TensorEntry
from sharded_ckpt.checkpoint.index import CheckpointIndex
from sharded_ckpt.checkpoint.pickle_source import read_pickle_shards
from sharded_ckpt.checkpoint.reader import CheckpointReader, open_checkpoint
from sharded_ckpt.checkpoint.source import TensorSource, open_source
from sharded_ckpt.checkpoint.tensors import Casting
from sharded_ckpt.checkpoint.writer import describe


def open_reader(
    location: str | os.PathLike[str], *, allow_pickle: bool = False, **where: Any
) -> CheckpointReader | PickledReader:
    """Open a checkpoint: safetensors, or pickles where the caller allows them and there is nothing else.

    Args:
        location: As `open_source` takes it.
        allow_pickle: Whether weights may come out of pickle files.
        **where: The other arguments of `open_source`.
    """
    if allow_pickle:
        source = open_source(location, **where)
        if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in source.names()):
            return PickledReader(source)
    return open_checkpoint(location, **where)


class PickledReader:
    """Reads tensors out of `pytorch_model.bin`, with `weights_only=True`; mapped where the file allows it.

    Args:
        source: The checkpoint.
    """

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self._tensors = read_pickle_shards(source)
        self.index = CheckpointIndex(source.location, dict.fromkeys(self._tensors, "pytorch_model.bin"))

    def headers(self, keys: Iterable[str]) -> dict[str, TensorEntry]:
        """Return dtype, shape and size of tensors."""
        specs = describe({key: self._tensors[key] for key in keys})
        return {key: TensorEntry(*spec, 0, self._tensors[key].nbytes) for key, spec in specs.items()}

    def prefetch(self, keys: Iterable[str]) -> None:
        """Do nothing: the files are open already."""

    def iter_tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors one by one."""
        return ((key, self._tensors[key]) for key in keys)

    def read(
        self,
        keys: Iterable[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | Callable[[str, torch.dtype], torch.dtype] | None = None,
        materialize: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return tensors. See `CheckpointReader.read`."""
        casting = Casting(dtype)
        read = {}
        for key in keys:
            found: Any = self._tensors[key]
            wanted = casting.target(key, found.dtype)
            read[key] = found.to(device=device, dtype=wanted, copy=materialize)
            if progress is not None:
                progress(found.nbytes)
        return read
