"""The verb that makes a child out of a parent's checkpoint."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchers.errors import ConfigError
from patchers.names import fold
from sharded_ckpt.checkpoint.coordinator import together
from sharded_ckpt.checkpoint.local import LocalSource, user_path
from sharded_ckpt.checkpoint.publish import transaction
from sharded_ckpt.checkpoint.reader import CheckpointReader, open_checkpoint
from sharded_ckpt.checkpoint.source import TensorSource, read_config
from sharded_ckpt.checkpoint.writer import DTYPE_NAMES
from sharded_ckpt.children.choices import Choices, Rules
from sharded_ckpt.children.config import child_config
from sharded_ckpt.children.parent import Parent
from sharded_ckpt.children.plan import FLOATS, ChildPlan, plan_child
from sharded_ckpt.children.recipes import Recipe
from sharded_ckpt.children.report import ChildReport
from sharded_ckpt.progress import byte_progress
from sharded_ckpt.saving.carried_files import carry_files

if TYPE_CHECKING:
    import torch

    from patchers.block_config import BlockConfig
    from patchers.descriptor import ModelDescriptor
    from patchers.dialects import Dialect
    from sharded_ckpt.runtime import Runtime

logger = logging.getLogger(__name__)

PathOrId = str | os.PathLike[str]


def init_child_from_parent(
    parent: PathOrId,
    block_configs: Sequence[BlockConfig | Mapping[str, Any]] | Mapping[Any, Any],
    out_path: str | os.PathLike[str],
    *,
    ffn_channels: Choices = "norm",
    kv_heads: Choices = "mean",
    query_heads: Choices | None = None,
    linear: str = "product",
    dtype: torch.dtype | None = None,
    dialect: Dialect | str | None = None,
    descriptor: ModelDescriptor | str = "auto",
    max_shard_size: int | str | None = None,
    durable: bool = True,
    manifest: bool = False,
    overwrite: bool = True,
    runtime: Runtime | Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathOrId | None = None,
    local_files_only: bool = False,
    progress: bool | Callable[[int], None] | None = None,
) -> ChildReport:
    """Make the checkpoint of a heterogeneous child by leaving things out of its parent's.

    The parent is never loaded: tensor by tensor, what the child keeps goes from file to file. Memory holds no
    more than the largest block takes in fp32. The directory appears whole or not at all.

    What becomes of a block. Shapes are `(out, in)`; with `H` query heads and `K` KV heads, query head `i`
    attends to KV head `i // (H / K)`.

    * **Nothing changes**: its tensors are copied byte for byte.
    * **`no_op`**: the part and its norm are left out, and not read.
    * **A narrower FFN** keeps some channels, in ascending order: rows of `gate` and `up` (and of their
      biases), columns of `down`. `"norm"`: those with the largest sum of squares of a channel's row of
      `gate`, its row of `up` and its column of `down`, summed in fp64, where the squares are exact; of equal
      ones the first. `"first"`: channels `0 … n-1`. `Scores`: those with the highest. `Indexes`: these.
    * **Fewer KV heads.** `"mean"`: each head of `k` and `v` (and of their biases) is the mean of `K / K'`
      neighbours, in fp32, rounded once; `q` and `o` stay, and each query head attends to the mean that its KV
      head is part of. `"first"`, `Scores`, `Indexes`: some KV heads stay as they are, in ascending order.
      Query heads of the others have nothing left to attend to: they move to the ends of the groups, so that
      every other one still attends to its own KV head, and their columns of `o` become zeros. So the child
      computes what the parent would without those heads, not another function, and training can take the
      idle query heads up again. (`PruneKVHeads` of NVIDIA Model-Optimizer; `"mean"` is its `AverageKV`. Its
      `FirstKV`, which lets query heads attend to a foreign KV head, is not offered.) `q_norm` and `k_norm`
      are shared by all heads and stay.
    * **Fewer query heads.** Those of KV heads that go, go first: rows of `q` and its bias, columns of `o`.
      Where a KV head shall have fewer than attend to it, `query_heads` says which stay, in ascending order.
    * **`replace_with_linear`**, by `linear="product"`: `W_o @ W_v` with each head of `W_v` repeated for the
      query heads on it, or `W_down @ W_up`; in fp32, rounded once to the parent's dtype. The norm stays;
      biases have no place in it (`ChildReport.warnings`, which also go to the log).

    Args:
        parent: A directory, a file in it, a hub id, or a URL. The weights of a URL that stay as they are go
            through memory one tensor at a time.
        block_configs: One entry a block, `BlockConfig` or a dict in any dialect; or a mapping with only the
            blocks that change, as in `per_layer_config`. What an entry does not say is as in the parent's
            block.
        out_path: The directory that will hold the child.
        ffn_channels: `"norm"`, `"first"`, `Scores(…)` or `Indexes(…)`; or a sequence or mapping with one of
            them for each block.
        kv_heads: `"mean"`, `"first"`, `Scores(…)` or `Indexes(…)`; or one of them for each block.
        query_heads: `"first"` of each KV head, `Scores(…)` or `Indexes(…)` of the parent's query heads; or
            one of them for each block. Needed only where a KV head shall have fewer query heads.
        linear: `"product"`.
        dtype: To cast floating-point tensors to; by default each keeps its own. A cast tensor is held in
            memory as a whole.
        dialect: How the child's config.json says its blocks; by default as the parent's, else AnyModel.
        descriptor: A `ModelDescriptor`, the name of a family, or `"auto"`.
        max_shard_size: Bytes of tensors in one file, or a text such as `"5GB"`; one file a rank if not given.
        durable: Whether the child must survive a power cut once this returns.
        manifest: Whether to write `manifest.json`, with the size and SHA-256 of each file.
        overwrite: Whether the directory may hold something already; a checkpoint in it is replaced.
        runtime: Where we are; each rank makes a run of blocks, so that the largest share is as small as can
            be. By default torch.distributed says, or this is the only process.
        revision: Of a hub id.
        token: For the hub.
        cache_dir: Where downloads are kept.
        local_files_only: Never reach for the network.
        progress: Whether to show a bar of the bytes made; by default on the main rank of a terminal. Or a
            function that is told each number of bytes.

    Returns:
        What was done; printed, it is a summary.

    Raises:
        BlockConfigError: A block asks for what the parent does not have: more channels or heads, a part that
            is gone. Block, field and both sizes are named, and nothing has been read or written.
        ConfigError: A rule is not known, or the child would take the place of its parent.
        FamilyError: Children of this family are not made so far.
        CheckpointError: The parent is broken, or there is something at `out_path`.
        CollectiveError: On all ranks, when some of several failed.

    Example:
        >>> from patchers import AttentionConfig, BlockConfig, FFNConfig
        >>> halved = BlockConfig(ffn=FFNConfig(intermediate_size=7168))
        >>> blocks = {3: halved, 5: BlockConfig(AttentionConfig(no_op=True))}  # doctest: +SKIP
        >>> print(init_child_from_parent("meta-llama/Llama-3.1-8B", blocks, "child"))  # doctest: +SKIP
    """
    started = time.perf_counter()
    where = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    from sharded_ckpt.children.memory import MappedStorage
    from sharded_ckpt.children.rows import RowReader
    from sharded_ckpt.children.stream import ChildStream
    from sharded_ckpt.runtime import as_runtime

    here = as_runtime(runtime)
    rules = Rules(ffn_channels, kv_heads, linear, query_heads)
    with together(here.control, f"planning a child of {os.fspath(parent)}"):
        job = _prepare(parent, where, descriptor, block_configs, rules, dtype, dialect)
        _refuse_parent_itself(job.reader.source, user_path(out_path))
        recipes = job.plan.share(here.global_rank, here.world_size)
        job.fetch(recipes)
    storage = MappedStorage(durable=durable)
    options: dict[str, Any] = {"manifest": manifest, "overwrite": overwrite, "storage": storage}
    options["plan"] = {"child": job.fingerprint(), "max_shard_size": max_shard_size}
    with (
        byte_progress(progress, sum(r.nbytes for r in recipes), here.is_main_process, "writing") as count,
        transaction(out_path, here.control, **options) as save,
    ):
        stream = ChildStream(RowReader(job.reader, storage), count)
        save.write_tensors(stream.tensors(recipes), max_shard_size=max_shard_size)
        if here.is_main_process:
            save.expect(recipe.key for recipe in job.plan.recipes)
            save.write_json("config.json", job.config)
            carry_files(save, job.reader.source)
    report = job.report(out_path, time.perf_counter() - started)
    for warning in report.warnings if here.is_main_process else ():
        logger.warning("%s", warning)
    return report


@dataclass(frozen=True)
class _Job:
    """All that is known before anything is written."""

    reader: CheckpointReader
    parent: Parent
    plan: ChildPlan
    config: dict[str, Any]

    def fetch(self, recipes: Sequence[Recipe]) -> None:
        """Download the files that recipes read, where they are on the hub."""
        self.reader.source.ensure(
            self.reader.index.by_file(key for recipe in recipes for key in recipe.sources)
        )

    def fingerprint(self) -> str:
        """Return what two jobs have in common only if they make the same child."""
        return hashlib.sha256(repr((self.plan, self.config)).encode()).hexdigest()

    def report(self, out_path: str | os.PathLike[str], seconds: float) -> ChildReport:
        """Say what was done."""
        blocks = self.plan.blocks
        return ChildReport(
            parent=self.parent.location,
            path=os.fspath(out_path),
            blocks=blocks,
            changed=tuple(index for index, block in enumerate(blocks) if block != self.parent.blocks[index]),
            tensors=len(self.plan.recipes),
            nbytes=self.plan.nbytes,
            parent_nbytes=sum(source.entry.nbytes for source in self.parent.tensors.values()),
            seconds=seconds,
            warnings=tuple(self._warnings(os.fspath(out_path))),
        )

    def _warnings(self, path: str) -> Iterator[str]:
        from sharded_ckpt.saving.saved_config import silent_warning

        if self.plan.lost:
            yield (
                f"{path}: {len(self.plan.lost)} biases have no place in a linear layer and are left out: "
                f"{fold(self.plan.lost)}"
            )
        if silent := silent_warning(self.config, path):
            yield silent


def _prepare(
    location: PathOrId,
    where: Mapping[str, Any],
    descriptor: ModelDescriptor | str,
    block_configs: Any,
    rules: Rules,
    dtype: torch.dtype | None,
    dialect: Dialect | str | None,
) -> _Job:
    """Open the parent and plan the child. Only headers are read."""
    from patchers.descriptor import ModelDescriptor
    from sharded_ckpt.config import load_model_config

    reader = open_checkpoint(location, lambda index: index, **where)
    native = load_model_config(reader.source)
    found = ModelDescriptor.of(descriptor, native)
    parent = Parent.of(reader.source.location, reader.headers(), native.to_dict(), found)
    plan = plan_child(parent, block_configs, rules, dtype=None if dtype is None else _dtype_name(dtype))
    config = child_config(
        read_config(reader.source),
        native,
        found.model_class.__name__,
        plan.blocks,
        dialect=dialect,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
    )
    return _Job(reader, parent, plan, config)


def _dtype_name(dtype: torch.dtype) -> str:
    name = DTYPE_NAMES.get(str(dtype))
    if name not in FLOATS:
        known = ", ".join(known for known, name in DTYPE_NAMES.items() if name in FLOATS)
        raise ConfigError(f"dtype={dtype}: expected one of {known}")
    return name


def _refuse_parent_itself(source: TensorSource, out_path: Path) -> None:
    if not isinstance(source, LocalSource) or not out_path.exists():
        return
    if os.path.samefile(source.directory, out_path):
        raise ConfigError(f"{out_path} is the parent itself; give the child a directory of its own")
