"""One load of one shard, step by step: prepare (nothing is read), fill, finish."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from patchers.errors import CheckpointError, ConfigError
from patchers.families import PLAIN_FAMILIES
from patchers.substitutes import Unowned
from sharded_ckpt.checkpoint.local import LocalSource
from sharded_ckpt.checkpoint.reader import CheckpointReader
from sharded_ckpt.checkpoint.tensors import dtype_of
from sharded_ckpt.config import load_model_config
from sharded_ckpt.loading.conversions import targets_of
from sharded_ckpt.loading.filling import (
    cast_rule,
    check_castable,
    check_complete,
    check_shapes,
    fill_buffers,
    fill_converted,
    fill_directly,
)
from sharded_ckpt.loading.finishing import casts_of, read_generation_config
from sharded_ckpt.loading.misfits import Misfits
from sharded_ckpt.loading.on_demand import MOST_MAPPED, TensorsOnDemand
from sharded_ckpt.loading.options import LoadOptions, dtype_named
from sharded_ckpt.loading.pickled import PickledReader
from sharded_ckpt.loading.plan import (
    LoadPlan,
    ModelNames,
    keys_that_may_feed,
    plan_conversion,
    plan_load,
    unexpected_text,
)
from sharded_ckpt.loading.quantised import take_coding
from sharded_ckpt.loading.report import LoadReport
from sharded_ckpt.loading.skeleton import Skeleton
from sharded_ckpt.model import num_blocks
from sharded_ckpt.ownership.plan import check_ownership
from sharded_ckpt.ownership.planning import plan_ownership
from sharded_ckpt.ownership.skeleton import model_bytes
from sharded_ckpt.runtime import Runtime, usable_device

logger = logging.getLogger(__name__)

_SAVED_ONCE = (r"rotary_emb\.inv_freq$", r"\.attn\.(?:attention\.)?masked_bias$")
"""Buffers that old versions of transformers saved, and that have since moved or gone."""


@dataclass
class ShardLoader:
    """The state of one load. The steps are called in order: `prepare`, `fill`, `finish`."""

    reader: CheckpointReader | PickledReader
    options: LoadOptions
    runtime: Runtime
    started: float = field(default_factory=time.perf_counter)

    def prepare(self) -> None:
        """Build the skeleton, decide what is owned, check that the files can feed it. Reads only headers."""
        self._describe_source()
        self._build()
        self._match()
        if not self.options.is_read_ahead:
            self.reader.prefetch(self.keys)

    def _describe_source(self) -> None:
        self.source, self.index = self.reader.source, self.reader.index
        self.config = self._config()
        self.coding = take_coding(self.config)
        self.parts = (
            {key: (key,) for key in self.index} if self.coding is None else self.coding.parts(self.index)
        )
        self.dtype = self._dtype()

    def _build(self) -> None:
        self.device = usable_device(self.options.device or self.runtime.device)
        skeleton = Skeleton.of(self.options, self.config, self.dtype)
        self.descriptor, self.shard = skeleton.descriptor, skeleton.model
        self.route = self._route()
        self.whole = self.shard.state_dict(keep_vars=True)
        self.computed = {name for name, _ in self.shard.named_non_persistent_buffers()}
        self.generation_config = read_generation_config(self.shard, self.source)
        self.ties = dict(self.shard.all_tied_weights_keys)
        self.num_blocks = num_blocks(self.shard, self.descriptor)
        self.targets = None if self.is_plain else targets_of(self.shard, self.whole, self.parts)
        self.owned = self._owned()
        skeleton.cut_to(self.owned)
        self.wanted = self.shard.state_dict(keep_vars=True)

    def _match(self) -> None:
        """Find the tensors that feed the shard, and check that they fit."""
        self.plan = self._plan()
        self.keys = [key for name in dict.fromkeys(self.plan.sources.values()) for key in self.parts[name]]
        self.entries = self.reader.headers(self.keys)
        self.nbytes = sum(entry.nbytes for entry in self.entries.values())
        if self.is_plain:
            check_shapes(self.plan, self.wanted, self.entries, self.index.weight_map)
        if self.route == "converted":
            check_castable(self.plan, self.wanted, self._found_dtypes())

    def fill(self, progress: Callable[[int], object] | None = None) -> None:
        """Read the tensors of this shard, and nothing else, into it.

        Args:
            progress: Told each number of bytes read.
        """
        self.progress = progress
        if self.route == "direct":
            tensors = self._read(cast_rule(self._wanted_dtypes()))
            fill_directly(self.shard, self.plan, tensors)
            fill_buffers(self.shard, self.device)
        else:
            self.shard = self._fill_converted().eval()

    def finish(self) -> PreTrainedModel:
        """Give the shard what transformers gives a loaded model, check it, and attach the report."""
        model = self.shard
        model.config.name_or_path = model.name_or_path = self._name_or_path()
        if self.generation_config is not None:
            model.generation_config = self.generation_config
        made = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        check_complete(made, self.device)
        report = self._report(made)
        vars(model)["load_report"] = report
        if not report:
            logger.warning("%s", report)
        return model

    def _config(self) -> PreTrainedConfig:
        given = self.options.config
        if given is None:
            return load_model_config(self.source, trust_remote_code=self.options.trust_remote_code)
        if not isinstance(given, PreTrainedConfig):
            raise ConfigError(f"model_config is a transformers config, not {type(given).__name__}")
        return copy.deepcopy(given)

    def _name_or_path(self) -> str:
        """Return what transformers and peft may reopen by the config's own class: not a translated config."""
        return (self.config.name_or_path or "") if self.options.config is None else self.source.location

    @property
    def is_plain(self) -> bool:
        """Whether the files hold the model's tensors as they are, by name, shape and dtype."""
        return self.descriptor.family in PLAIN_FAMILIES and self.coding is None

    def _route(self) -> str:
        """Choose the way in: direct where it is known to be exact."""
        if self.options.route == "direct" and not self.is_plain:
            raise ConfigError(
                f"{self.descriptor.family} checkpoints are not known to need no conversion; use "
                "route='converted'"
            )
        if self.options.route not in ("auto", "direct", "converted"):
            raise ConfigError(f"route is 'auto', 'direct' or 'converted', not {self.options.route!r}")
        return (
            ("direct" if self.is_plain else "converted")
            if self.options.route == "auto"
            else self.options.route
        )

    def _dtype(self) -> torch.dtype:
        """Return the dtype asked for, else the config's, else that of the first float in the files."""
        for dtype in (*self._asked_dtypes(), self.config.dtype):
            if dtype is not None:
                return dtype_named(dtype) if isinstance(dtype, str) else dtype
        file, keys = next(iter(self.index.by_file().items()), ("", []))
        entries = self.reader.headers(keys)
        found = (dtype_of(key, entry, file) for key, entry in entries.items())
        return next((dtype for dtype in found if dtype.is_floating_point), torch.get_default_dtype())

    def _asked_dtypes(self) -> list[torch.dtype | str]:
        asked = (self.options.dtype, self.runtime.dtype)
        return [dtype for dtype in asked if dtype is not None and dtype != "auto"]

    def _owned(self) -> set[int]:
        if self.options.owned != "auto":
            return check_ownership(self.options.owned, self.num_blocks)  # type: ignore[arg-type]
        costs = model_bytes(self.shard, self.descriptor)
        plan = plan_ownership(costs, self.runtime.world_size)
        return set(plan.blocks[self.runtime.global_rank])

    def _plan(self) -> LoadPlan:
        names = ModelNames(
            whole=self.whole,
            owned=self.wanted,
            ties=self.ties,
            prefix=self.shard.base_model_prefix,
            ignorable=_ignorable(self.shard),
            computed=self.computed,
        )
        if self.is_plain:
            plan = plan_load(names, self.index.keys(), self.index.location)
        elif self.targets is not None:
            plan = plan_conversion(names, self.targets)
        else:
            stubs = [module.name for module in self.shard.modules() if isinstance(module, Unowned)]
            hinted = keys_that_may_feed(self.parts, self.owned, stubs)
            plan = LoadPlan({key: key for key in hinted})
        if plan.unexpected and self.options.strict:
            raise CheckpointError(unexpected_text(plan.unexpected, self.index.location))
        return plan

    def _found_dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype that each tensor of the plan has in the files; quantised ones have none."""
        plain = (self.parts[key] for key in self.plan.sources.values())
        weight_map = self.index.weight_map
        return {key: dtype_of(key, self.entries[key], weight_map[key]) for key, *more in plain if not more}

    def _wanted_dtypes(self) -> dict[str, torch.dtype]:
        return {key: self.wanted[name].dtype for name, key in self.plan.sources.items()}

    def _read(self, dtype: Any) -> Mapping[str, torch.Tensor]:
        return self.reader.read(
            self.keys,
            device=self.device,
            dtype=dtype,
            materialize=self.options.materialize,
            progress=self.progress,
        )

    def _fill_converted(self) -> PreTrainedModel:
        tensors = self._on_demand() or self._read(None)
        state = {name: tensors[key] for name, key in self.plan.sources.items()}
        options: dict[str, Any] = {"dtype": self.dtype}
        if self.device.type != "cpu":
            options["device_map"] = {"": self.device}
        if self.options.attn_implementation is not None:
            options["attn_implementation"] = self.options.attn_implementation
        misfits = Misfits.of(self.plan, self.wanted, self.entries, self.parts, self.index)
        model, info = fill_converted(
            self.descriptor, self.config, self.options.block_configs, self.owned, state, options, misfits
        )
        spare = tuple(sorted(info["unexpected_keys"])) if len(self.owned) == self.num_blocks else ()
        if spare and self.options.strict:
            raise CheckpointError(unexpected_text(spare, self.index.location))
        return model

    def _on_demand(self) -> TensorsOnDemand | None:
        """Return the tensors unread: what is not needed stays so, and what is fused takes no memory twice."""
        is_mapped = self.device.type == "cpu" and not self.options.materialize
        if is_mapped and self.coding is None and len(self.keys) > MOST_MAPPED:
            return None
        copies = self.device.type == "cpu" and self.options.materialize
        return TensorsOnDemand(self.reader, self.parts, self.coding, copies, self.progress)

    def _report(self, made: Mapping[str, torch.Tensor]) -> LoadReport:
        tensors = {id(tensor): tensor for tensor in made.values()}
        ties = [pair for pair in self.ties.items() if set(pair) <= set(made)]
        return LoadReport(
            location=self.source.location,
            blocks=tuple(sorted(self.owned)),
            num_blocks=self.num_blocks,
            tensors=len(self.wanted),
            nbytes=sum(t.numel() * t.element_size() for t in tensors.values()),
            seconds=time.perf_counter() - self.started,
            route=self.route,
            unexpected=self.plan.unexpected,
            ignored=self.plan.ignored,
            cast=casts_of(self.plan, self._found_dtypes(), made, self.dtype),
            dequantised=sum(len(self.parts[key]) > 1 for key in self.plan.sources.values()),
            cast_asked=bool(self._asked_dtypes()),
            tied=tuple(name for name, partner in ties if made[name] is made[partner]),
            untied=tuple(name for name, partner in ties if made[name] is not made[partner]),
            revision=self.options.revision,
            directory=str(self.source.directory) if isinstance(self.source, LocalSource) else None,
        )


def _ignorable(model: PreTrainedModel) -> str:
    patterns = {*(model._keys_to_ignore_on_load_unexpected or ()), *_SAVED_ONCE}
    return "|".join(f"(?:{pattern})" for pattern in sorted(patterns))
