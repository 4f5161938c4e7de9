"""This rank's connections to the other ranks of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from patchers.errors import CollectiveError, ConfigError
from sharded_ckpt.pipeline.hop import HopIn, HopOut, receive_described, send_described
from sharded_ckpt.pipeline.inputs import differing
from sharded_ckpt.pipeline.lineup import Lineup
from sharded_ckpt.pipeline.wire import Arrival, Wire
from sharded_ckpt.runtime import Runtime

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = tuple["ProcessGroup", "ProcessGroup"]

_groups: WeakKeyDictionary[ProcessGroup, dict[float, Groups]] = WeakKeyDictionary()


class Links:
    """Two wires, one for each direction, and the hops to the neighbours.

    Args:
        lineup: Who runs what.
        runtime: The ranks. Making the links is collective.

    Attributes:
        forward: Carries hidden states onwards.
        back: Carries token ids, and in training gradients, back.
        before: Where hidden states come from; None on the first stage.
        after: Where they go; None on the last stage.
    """

    def __init__(self, lineup: Lineup, runtime: Runtime) -> None:
        self._lineup, self._rank = lineup, runtime.global_rank
        self._broken: str | None = None
        self._of, self._timeout = runtime.process_group or default_group(), runtime.timeout
        forward, back = _two_groups(self._of, runtime.timeout)
        self.forward, self.back = Wire(forward, runtime.device), Wire(back, runtime.device)
        before, after = lineup.before(self._rank), lineup.after(self._rank)
        self.before = None if before is None else HopIn(self.forward, before)
        self.after = None if after is None else HopOut(self.forward, after)

    @property
    def sent_bytes(self) -> int:
        """How much this rank has sent."""
        return self.forward.sent_bytes + self.back.sent_bytes

    def compare(self, fingerprint: torch.Tensor) -> None:
        """Make sure, from each rank to the next, that all were given the same inputs.

        Raises:
            CollectiveError: This rank's differ from those of the rank before.
        """
        if self._rank + 1 < len(self._lineup.owned):
            self.forward.send(fingerprint, self._rank + 1)
        if self._rank > 0:
            told = self.forward.ask(fingerprint.shape, fingerprint.dtype, self._rank - 1).wait()
            if names := differing(fingerprint, told):
                raise CollectiveError(
                    f"rank {self._rank} was given other inputs than rank {self._rank - 1}: "
                    f"{', '.join(names)} differ. All ranks must call the pipeline with the same inputs; only "
                    "caches are their own"
                )

    def conclude(self) -> None:
        """Return when all ranks have done their work; until then one could still fail."""
        done = torch.zeros(1, dtype=torch.int64)
        self.settle()  # before this rank says that nothing of its work can fail any more
        for _ in ("all ranks have come", "all ranks know it"):  # a rank that comes takes what it is sent
            if self._rank != self._lineup.head_rank:
                self.ask_last(done.shape, done.dtype).wait()
            else:
                self.tell_all(done)
                self.back.settle()

    def tell_all(self, tensor: torch.Tensor) -> None:
        """Send a tensor from the last stage to all other ranks."""
        for rank in self._others():
            self.back.send(tensor, rank)

    def ask_last(self, shape: Sequence[int], dtype: torch.dtype) -> Arrival:
        """Ask for the next tensor that the last stage tells all."""
        return self.back.ask(shape, dtype, self._lineup.head_rank)

    def share(self, tensors: Sequence[torch.Tensor] | None, count: int) -> list[torch.Tensor]:
        """Return, on every rank, the tensors that the last stage gives, of whatever shapes.

        Args:
            tensors: On the last stage.
            count: How many; known to all ranks.
        """
        head = self._lineup.head_rank
        if tensors is None:
            return [receive_described(self.back, head) for _ in range(count)]
        for rank in self._others():
            for tensor in tensors:
                send_described(self.back, tensor, rank)
        return list(tensors)

    def settle(self) -> None:
        """Wait until everything that was sent has arrived."""
        self.forward.settle()
        self.back.settle()

    def require_whole(self) -> None:
        """Refuse to go on where connections were broken.

        Raises:
            CollectiveError: It says why they were.
        """
        if self._broken:
            raise CollectiveError(
                f"this pipeline broke earlier ({self._broken}); make a new PipelineStage on all ranks"
            )

    def abort(self, why: str) -> None:
        """Break all connections, so that no rank waits for this one; new links can be made afterwards."""
        self._broken = self._broken or why
        _groups.get(self._of, {}).pop(self._timeout, None)
        self.forward.abort()
        self.back.abort()

    def _others(self) -> list[int]:
        return [rank for rank in range(len(self._lineup.owned)) if rank != self._rank]


def default_group() -> ProcessGroup:
    """Return the default group of torch.distributed.

    Raises:
        ConfigError: There is none.
    """
    group = dist.group.WORLD
    if group is None:
        raise ConfigError("there is no process group: call torch.distributed.init_process_group first")
    return group


def _two_groups(of: ProcessGroup, timeout: float) -> Groups:
    """Return the groups of all pipelines over these ranks; collective where they are not there yet."""
    made = _groups.setdefault(of, {})
    if timeout not in made:
        forward, back = (
            dist.new_group(
                dist.get_process_group_ranks(of),
                timeout=timedelta(seconds=timeout),
                use_local_synchronization=True,
                group_desc=f"sharded_ckpt pipeline {direction}",
            )
            for direction in ("forward", "back")
        )
        made[timeout] = forward, back
    return made[timeout]
