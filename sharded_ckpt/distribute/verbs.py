"""A state dict that one rank holds, handed out to the shards of all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchers.errors import CheckpointError, ConfigError
from patchers.names import fold
from sharded_ckpt.checkpoint.coordinator import refuse_disagreement, together
from sharded_ckpt.checkpoint.raw import bytes_of
from sharded_ckpt.collective.control_group import CHUNK_BYTES, ControlGroup
from sharded_ckpt.distribute.distribution import (
    Distribution,
    Held,
    RankTable,
    global_names,
    plan_distribution,
)
from sharded_ckpt.distribute.owned_tensors import OwnedTensors, dtype_name, is_floating
from sharded_ckpt.runtime import Runtime, as_runtime

logger = logging.getLogger(__name__)


def load_state_dict_to_shards(
    model_shard: nn.Module,
    loaded_state_dict: Mapping[str, Tensor] | None = None,
    *,
    runtime: Runtime | Any = None,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    ties: Mapping[str, str] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    sent: Callable[[int], None] | None = None,
) -> None:
    """Load a state dict that rank 0 holds into the shards of all ranks.

    Each rank receives only what its shard owns, straight into place; rank 0 has one chunk under way at a time
    and pickles nothing. All ranks call this together. What a shard owns are the parameters and persistent
    buffers of its `state_dict()`; stubs of unowned blocks have none. Buffers that are not persistent (rotary
    tables) are in no state dict: a native model computes its own, if they are on meta. Names may carry what
    wrappers put into them (`module.`, `_orig_mod.`, …), here and there.

    Parameters are replaced, as `load_state_dict(assign=True)` does, so make optimizers afterwards. They land
    on the device where the shard has them, or on the runtime's if that is meta. On rank 0 they share memory
    with the state dict where nothing has to be converted. After an error the shards may be loaded in part.

    Args:
        model_shard: This rank's shard, or a whole model.
        loaded_state_dict: The state dict on rank 0, None on all others.
        runtime: Where we are. By default torch.distributed says, or this is the only process.
        strict: Whether a tensor that no shard owns, or a missing one whose parameter holds numbers already,
            is an error; otherwise both are logged. A parameter on meta must always get its tensor.
        dtype: What floating-point tensors are cast to; by default they stay what the state dict says.
            Integers are never cast.
        ties: Which name is tied to which in the whole model, as {"lm_head.weight":
            "model.embed_tokens.weight"}: a shard with one of them takes the tensor of the other where its own
            is missing. By default what the model's class and config say.
        chunk_bytes: Most bytes under way at once; the same on all ranks.
        sent: Told on rank 0 the bytes of each chunk once it has been sent.

    Raises:
        ConfigError: Rank 0 has no state dict, or another rank has one; or `dtype` is not a floating one, or
            the ranks disagree on `chunk_bytes`.
        MissingKeysError: Shards own tensors that the state dict lacks.
        CheckpointError: Shapes or kinds of numbers differ, there are tensors that no shard owns, or values
            that are no plain tensors.
        CollectiveError: A rank failed, died or did not come; all ranks raise this.

    Example:
        >>> model = nn.Linear(2, 3, device="meta")
        >>> load_state_dict_to_shards(model, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
        >>> model.weight.sum().item()
        6.0
    """
    here = as_runtime(runtime)
    doing = "comparing the state dict with the shards"
    with together(here.control, doing):
        shard = OwnedTensors(model_shard, here.device, dtype, ties)
        source = _Source({} if loaded_state_dict is None else loaded_state_dict)
        brings = loaded_state_dict is not None
        table = RankTable(shard.slots, brings, source.held if here.is_main_process else {}, dtype_name(dtype))
    said = here.control.gather({"table": table.to_json(), "cut": {"chunk_bytes": chunk_bytes}}, doing)
    refuse_disagreement([told["cut"] for told in said], "hand out the state dict")
    tables = [RankTable.from_json(told["table"]) for told in said]
    plan = plan_distribution(tables, strict)
    if here.is_main_process:
        _log_leftovers(tables, plan)
    post = _Post(here, chunk_bytes, sent)
    post.connect()
    with together(here.control, "comparing tied tensors of the state dict"):
        if here.is_main_process:
            source.check_equal(plan)
    with together(here.control, "handing out the state dict"):
        _hand_out(post, here, source, shard, tables[0].held, plan)
        _fill_what_is_computed(model_shard, here.device)


def _hand_out(
    post: _Post,
    here: Runtime,
    source: _Source,
    shard: OwnedTensors,
    held: Mapping[str, Held],
    plan: Distribution,
) -> None:
    mine = [(index, key) for index, key in enumerate(plan.keys[here.global_rank]) if key is not None]
    if here.is_main_process:
        post.send({rank: source.tensors_of(keys) for rank, keys in enumerate(plan.keys) if rank})
        shared: set[str] = set()
        for index, key in mine:
            shard.fill(index, shard.convert(index, source.tensors[key], copy=key in shared))
            shared.add(key)
    else:
        for index, key in mine:
            found = getattr(torch, held[key].dtype)
            landing = shard.landing(index, found)
            post.receive(landing, found)
            shard.fill(index, landing)


def _fill_what_is_computed(model: nn.Module, device: torch.device) -> None:
    """Give a native model the buffers that no state dict holds; other modules keep theirs."""
    computed: Any = getattr(model, "named_non_persistent_buffers", tuple)()
    if any(buffer.is_meta for _, buffer in computed):
        from sharded_ckpt.loading.filling import (
            fill_buffers,  # imports transformers, which plain modules do not need
        )

        fill_buffers(model, device)  # type: ignore[arg-type]


def _log_leftovers(tables: list[RankTable], plan: Distribution) -> None:
    if plan.unexpected:
        logger.warning("no shard owns %s of the state dict; left out", fold(plan.unexpected))
    for rank, (table, keys) in enumerate(zip(tables, plan.keys, strict=True)):
        kept = [slot.names[0] for slot, key in zip(table.slots, keys, strict=True) if key is None]
        if kept:
            logger.warning("the state dict lacks %s; rank %d keeps its own", fold(kept), rank)


class _Source:
    """The state dict, by global names."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        if not isinstance(state, Mapping):
            raise ConfigError(
                f"loaded_state_dict is a {type(state).__name__}; it must be a mapping of tensors"
            )
        for key, value in state.items():
            _require_plain_tensor(key, value)
        names = global_names(state, "the state dict")
        self.tensors = {names[key]: tensor.detach() for key, tensor in state.items()}

    @property
    def held(self) -> dict[str, Held]:
        return {
            key: Held(tuple(tensor.shape), dtype_name(tensor.dtype) or "", is_floating(tensor))
            for key, tensor in self.tensors.items()
        }

    def tensors_of(self, keys: tuple[str | None, ...]) -> Iterator[Tensor]:
        return (self.tensors[key] for key in keys if key is not None)

    def check_equal(self, plan: Distribution) -> None:
        for first, *others in plan.equal:
            for other in others:
                if not _same(self.tensors[first], self.tensors[other]):
                    raise CheckpointError(
                        f"{first} and {other} are one parameter in the model, but differ in the state dict; "
                        "untie the model (tie_word_embeddings=False) or remove one of them"
                    )


class _Post:
    """Sends and receives; with one rank there is nobody to send to."""

    def __init__(self, here: Runtime, chunk_bytes: int, sent: Callable[[int], None] | None) -> None:
        self._chunk_bytes, self._sent = chunk_bytes, sent
        self._control = here.control if isinstance(here.control, ControlGroup) else None
        if self._control is None and here.world_size > 1:
            raise ConfigError(
                f"the runtime's control is a {type(here.control).__name__}, which cannot send tensors; "
                "leave it out, or give one made by sharded_ckpt.collective.control_group"
            )

    def connect(self) -> None:
        if self._control:
            self._control.connect()

    def send(self, outgoing: dict[int, Iterator[Tensor]]) -> None:
        if self._control:
            self._control.send_tensors(outgoing, chunk_bytes=self._chunk_bytes, sent=self._sent)

    def receive(self, into: Tensor, dtype: torch.dtype) -> None:
        if self._control:
            self._control.receive_tensor(into, dtype=dtype, chunk_bytes=self._chunk_bytes)


def _require_plain_tensor(key: str, value: Any) -> None:
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
        raise CheckpointError(f"{key} of the state dict is a {type(value).__name__}, not a plain tensor")
    if value.is_meta or value.layout != torch.strided or value.is_quantized:
        what = "on meta, without numbers" if value.is_meta else "sparse or quantised by torch"
        raise CheckpointError(f"{key} of the state dict is {what}; only plain tensors can be handed out")


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    one, other = (tensor.resolve_conj().resolve_neg().contiguous() for tensor in (one, other))
    return torch.equal(bytes_of(one), bytes_of(other))  # a NaN equals itself here
