"""What ranks do together: votes on the fate of rank-local work, and tensors sent in bounded chunks.

`ControlGroup` is the `Coordinator` that spans ranks. Votes go over the store of the process group, so they
still work when ranks are dead; tensors go over a gloo group of its own, as raw bytes in CPU memory, whatever
device they come from or go to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from patchers.errors import CollectiveError, ConfigError
from sharded_ckpt.checkpoint.coordinator import together
from sharded_ckpt.checkpoint.raw import bytes_of
from sharded_ckpt.collective.agreement import Agreement, silence_of
from sharded_ckpt.collective.memberships import as_many_memberships, memberships
from sharded_ckpt.collective.store_thread import StoreLostError
from sharded_ckpt.collective.verdict import ConnectionCutError, cut_off, entry, judge

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

TIMEOUT = 600.0
"""Seconds for which ranks wait for one that lives but does not come, unless told otherwise."""

CHUNK_BYTES = 64 * 2**20
"""Most bytes that are under way at once when tensors are sent."""

_STORE_LOST = (
    "{doing} failed: the store through which the ranks agree {lost}. It lives in rank 0 or in the launcher; "
    "see what they printed"
)


@dataclass
class _Links:
    """What ranks share for as long as their process group lives."""

    agreement: Agreement
    global_ranks: list[int]
    gloo: ProcessGroup | None = None
    broken: str | None = None


_links: WeakKeyDictionary[ProcessGroup, _Links] = WeakKeyDictionary()


def control_group(process_group: ProcessGroup | None = None, *, timeout: float = TIMEOUT) -> ControlGroup:
    """Return the control group of a process group. This call waits for nobody.

    Args:
        process_group: The ranks; by default all of torch.distributed, which must be initialised.
        timeout: Seconds to wait for a rank that lives but does not come.

    Raises:
        ConfigError: There is no process group.
    """
    import torch.distributed as dist

    group = process_group or dist.group.WORLD
    if group is None:
        raise ConfigError("there is no process group: call torch.distributed.init_process_group first")
    links = _links.get(group)
    if links is None:
        store = dist.PrefixStore("sharded_ckpt", group.get_group_store())
        ranks = dist.get_process_group_ranks(group)
        links = _links[group] = _Links(Agreement(store, group.rank(), group.size(), timeout), ranks)
    return ControlGroup(group.rank(), group.size(), timeout, links)


class ControlGroup:
    """The ranks of a process group, as they vote and send tensors. Made by `control_group`.

    No call waits without bound. A rank that shows no sign of life for 60 seconds (or 3/4 of `timeout`, if
    that is less) is given up; so is one that lives but has not come after `timeout` seconds. Every surviving
    rank then raises the same `CollectiveError`, which names the ranks that did not answer.

    Attributes:
        rank: This process's rank in the group.
        world_size: Number of ranks.
        timeout: Seconds to wait for a rank that lives but does not come.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, links: _Links) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._links = links

    def __repr__(self) -> str:
        return f"ControlGroup(rank={self.rank}, world_size={self.world_size}, timeout={self.timeout:g})"

    def gather(self, value: Any, doing: str) -> list[Any]:
        """Return the value of every rank, in rank order, on every rank.

        Args:
            value: Plain JSON data; tuples arrive as lists.
            doing: What is being done, in the same words on all ranks (paths and numbers may differ).

        Raises:
            CollectiveError: A rank is missing or out of step, or its value is not plain.
        """
        error: Exception | None = None
        try:
            _require_plain(value)
        except TypeError as caught:
            value, error = None, caught
        return [said["value"] for said in self._round("gather", doing, error, value)]

    def vote(self, error: BaseException | None, doing: str) -> None:
        """Raise on every rank if any rank brings an error, is missing or is out of step.

        Args:
            error: What went wrong on this rank, or None; on this rank it becomes the `__cause__`.
            doing: What is being done, in the same words on all ranks (paths and numbers may differ).

        Raises:
            CollectiveError: The same text on all ranks; it names the failed ranks and their causes.
        """
        self._round("vote", doing, error)

    def _round(self, act: str, doing: str, error: BaseException | None, value: Any = None) -> tuple[Any, ...]:
        try:
            verdict = self._links.agreement.decide(entry(act, doing, error, value), self.timeout)
        except StoreLostError as lost:
            raise CollectiveError(_STORE_LOST.format(doing=doing, lost=lost), {0: str(lost)}) from error
        failure = judge(verdict)
        if failure is None:
            return verdict.entries
        if verdict.breaks_connections:
            self._links.broken = self._links.broken or str(failure)
        failure.agreed = True
        raise failure from _cause(error)

    def connect(self) -> None:
        """Connect the ranks for sending, once. Collective; to be called before any work that may fail.

        Raises:
            CollectiveError: Not all ranks came; it names those that did not.
        """
        import torch.distributed as dist

        # names the ranks that are not there, which gloo would not
        told = self.gather(memberships(), "connecting the ranks")
        if self._links.gloo is None:
            with together(self, "connecting the ranks by gloo"), as_many_memberships(max(told)):
                self._links.gloo = dist.new_group(
                    self._links.global_ranks,
                    timeout=timedelta(seconds=silence_of(self.timeout)),
                    backend="gloo",
                    use_local_synchronization=True,
                    group_desc="sharded_ckpt control",
                )

    def send_tensors(
        self,
        outgoing: Mapping[int, Iterable[Tensor]],
        *,
        chunk_bytes: int = CHUNK_BYTES,
        sent: Callable[[int], None] | None = None,
    ) -> None:
        """Send each rank its tensors, in turns of one chunk, so that no rank waits long for its next one.

        One chunk is under way at a time; a contiguous CPU tensor is sent from where it lies. The other ranks
        call `receive_tensor` for each of their tensors, in order.

        Args:
            outgoing: The tensors for each rank; iterated lazily.
            chunk_bytes: Most bytes to have under way at once; the same on all ranks.
            sent: Told the bytes of each chunk once it has been sent.

        Raises:
            ConnectionCutError: A rank did not take its bytes; vote to learn why.
        """
        for turn in itertools.zip_longest(*(_chunks(to, ts, chunk_bytes) for to, ts in outgoing.items())):
            for to, chunk in filter(None, turn):
                raw = bytes_of(chunk.cpu().resolve_conj().resolve_neg().contiguous())
                self._transfer("isend", raw, to)
                if sent:
                    sent(raw.numel())

    def receive_tensor(
        self,
        into: Tensor,
        source: int = 0,
        *,
        dtype: torch.dtype | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Fill a tensor with the next one that `source` sends here.

        Args:
            into: Where to; on any device. CPU memory is filled directly, if contiguous and without a cast.
            source: The sending rank.
            dtype: The dtype of what is sent; cast to that of `into`.
            chunk_bytes: Most bytes to have under way at once; the same on all ranks.

        Raises:
            ConnectionCutError: The bytes did not come; vote to learn why.
        """
        import torch

        dtype = dtype or into.dtype
        with torch.no_grad():
            for part in chunks(into, chunk_bytes, dtype.itemsize):
                direct = part.dtype == dtype and part.device.type == "cpu" and part.is_contiguous()
                landing = part if direct else torch.empty(part.shape, dtype=dtype, device="cpu")
                self._transfer("irecv", bytes_of(landing), source)
                if not direct:
                    part.copy_(landing)

    def _transfer(self, operation: str, raw: Tensor, peer: int) -> None:
        import torch.distributed as dist

        if self._links.broken:
            raise ConnectionCutError(f"ranks were lost earlier: {self._links.broken}")
        if self._links.gloo is None:
            raise CollectiveError("the ranks are not connected: call connect() on all of them first")
        where = {"group_dst": peer} if operation == "isend" else {"group_src": peer}
        try:
            work = getattr(dist, operation)(raw, group=self._links.gloo, **where)
            work.wait(timedelta(seconds=silence_of(self.timeout)))
        except RuntimeError as error:
            raise cut_off(peer, error) from error


def chunks(tensor: Tensor, limit: int, itemsize: int | None = None) -> Iterator[Tensor]:
    """Cut a tensor into views of at most `limit` bytes (at least one element), in row-major order.

    The cuts depend on the shape and the item size alone, so sender and receiver make the same ones.

    Args:
        tensor: Any strided tensor.
        limit: Bytes.
        itemsize: Bytes of an element as it is sent; by default those of the tensor's own dtype.

    Example:
        >>> import torch
        >>> [list(chunk.shape) for chunk in chunks(torch.zeros(5, 2), limit=16)]
        [[2, 2], [2, 2], [1, 2]]
    """
    if tensor.numel() == 0:
        return
    itemsize = itemsize or tensor.element_size()
    if tensor.numel() * itemsize <= limit or tensor.numel() == 1:
        yield tensor
        return
    row_bytes = tensor[0].numel() * itemsize
    if row_bytes > limit:
        for row in tensor:
            yield from chunks(row, limit, itemsize)
    else:
        yield from tensor.split(max(1, limit // row_bytes))


def _chunks(to: int, tensors: Iterable[Tensor], limit: int) -> Iterator[tuple[int, Tensor]]:
    for tensor in tensors:
        for chunk in chunks(tensor.detach(), limit):
            yield to, chunk


def _require_plain(value: Any, where: str = "value") -> None:
    """Refuse what JSON would refuse, or change without a word."""
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _require_plain(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; only str keys can be gathered")
            _require_plain(item, f"{where}[{key!r}]")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"{where} is a {type(value).__name__}; only plain JSON data can be gathered")


def _cause(error: BaseException | None) -> BaseException | None:
    """Return what an error is said to come from.

    contextlib takes any RuntimeError that comes from a StopIteration for the one that Python makes of it, and
    would raise the StopIteration in its place, on one rank alone.
    """
    return RuntimeError(f"StopIteration: {error}") if isinstance(error, StopIteration) else error
