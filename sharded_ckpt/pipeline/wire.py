"""Tensors from rank to rank: sends that are kept until they have arrived, receives in advance.

gloo sends by rendezvous and reads the tensor late: a dropped `Work` loses the message, and a buffer that
changes before it has arrived sends its new value. So both are kept, in a bounded queue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sharded_ckpt.collective.verdict import cut_off

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

MOST_UNDER_WAY = 8
"""Sends that may be under way at once; the next one waits for the first of them to arrive."""


_AT_ONCE = timedelta(milliseconds=1)
_NEVER_SENT = 1  # a tag: gloo ends the process if what has come already is larger than what is waited for


@dataclass
class Arrival:
    """A tensor that has been asked for, and that may be there already."""

    work: Work | None
    into: torch.Tensor
    source: int
    device: torch.device

    def wait(self) -> torch.Tensor:
        """Return the tensor.

        Raises:
            ConnectionCutError: It did not come in time, or its rank is gone.
        """
        _wait(self.work, self.source)
        return self.into.to(self.device)


class Wire:
    """One direction of traffic: the tensors of each pair of ranks arrive in the order of their sending.

    A group serves one direction only, so that a receive in advance never stands before a send in its queue.

    Attributes:
        sent_bytes: How much this rank has sent.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._through = torch.device("cpu") if _backend_of(group, device) == "gloo" else device
        self._under_way: deque[tuple[Work | None, torch.Tensor, int]] = deque()
        self.sent_bytes = 0

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send a tensor, which must not be changed any more; wait only if too many are under way.

        Raises:
            ConnectionCutError: An earlier tensor did not arrive.
        """
        sent = tensor.detach().to(self._through).contiguous()
        self._settle(MOST_UNDER_WAY - 1)
        try:
            work = dist.isend(sent, group=self._group, group_dst=to)
        except RuntimeError as error:
            raise cut_off(to, error) from error
        self._under_way.append((work, sent, to))
        self.sent_bytes += sent.nbytes

    def ask(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Arrival:
        """Ask for the next tensor that a rank sends, without waiting for it.

        Raises:
            ConnectionCutError: The rank is gone.
        """
        into = torch.empty(tuple(shape), dtype=dtype, device=self._through)
        try:
            return Arrival(dist.irecv(into, group=self._group, group_src=source), into, source, self._device)
        except RuntimeError as error:
            raise cut_off(source, error) from error

    def settle(self) -> None:
        """Wait until everything that was sent has arrived.

        Raises:
            ConnectionCutError: Something did not arrive in time.
        """
        self._settle(0)

    def abort(self) -> None:
        """Break all connections, so that no rank waits for this one any more."""
        self._under_way.clear()
        self._group.abort()
        for peer in set(range(self._group.size())) - {self._group.rank()}:
            # gloo knows no abort, but a wait in vain closes all connections of a group; with a peer that is
            # gone already there is none, so the others would not hear of it
            with suppress(RuntimeError):
                work = dist.irecv(torch.empty(1), group=self._group, group_src=peer, tag=_NEVER_SENT)
                if work is not None:
                    work.wait(_AT_ONCE)

    def _settle(self, left: int) -> None:
        while len(self._under_way) > left:
            work, _, to = self._under_way[0]
            _wait(work, to)
            self._under_way.popleft()


def _wait(work: Work | None, peer: int) -> None:
    began = time.monotonic()
    try:
        if work is not None:  # torch gives None to ranks outside of a group
            work.wait()
    except RuntimeError as error:
        raise cut_off(peer, error, time.monotonic() - began) from error


def _backend_of(group: ProcessGroup, device: torch.device) -> str:
    """Return the name of the backend that carries a group's tensors of a kind of device."""
    backends = dict(entry.split(":") for entry in dist.get_backend_config(group).split(","))
    return backends.get(device.type, "gloo")
