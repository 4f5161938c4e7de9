"""Where we are: device, dtype, rank and number of ranks, and whom to agree with."""

from __future__ import annotations

import operator
import os
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from patchers.errors import ConfigError
from sharded_ckpt.checkpoint.coordinator import Coordinator, Solo
from sharded_ckpt.collective.control_group import TIMEOUT, control_group

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

REQUIRED = ("device", "dtype", "global_rank", "world_size", "is_main_process", "is_last_process")
"""What an object must have to serve as a runtime."""


@dataclass(frozen=True)
class Runtime:
    """Where this process stands among those that share a model.

    Attributes:
        device: Where this rank's tensors live.
        dtype: What floating-point tensors are to be; None for what the checkpoint says.
        global_rank: This process, from 0.
        world_size: Number of processes.
        is_main_process: Whether this is rank 0.
        is_last_process: Whether this is the last rank.
        process_group: The ranks; None for the default group of torch.distributed.
        control: Votes and gathers among the ranks. Always there; it raises where ranks cannot be reached.
        timeout: Seconds to wait for a rank that lives but does not come to a collective call.

    Example:
        >>> import torch
        >>> runtime = Runtime(torch.device("cpu"), torch.bfloat16)
        >>> runtime.global_rank, runtime.is_main_process, runtime.is_last_process
        (0, True, True)
    """

    device: torch.device
    dtype: torch.dtype | None = None
    global_rank: int = 0
    world_size: int = 1
    is_main_process: bool = True
    is_last_process: bool = True
    process_group: ProcessGroup | None = field(default=None, repr=False)
    control: Coordinator = field(default_factory=Solo, repr=False, compare=False)
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if not 0 <= self.global_rank < self.world_size:
            raise ConfigError(f"global_rank is {self.global_rank}; it must be in 0..{self.world_size - 1}")
        for name, rank in (("is_main_process", 0), ("is_last_process", self.world_size - 1)):
            told = getattr(self, name)
            if told is not (self.global_rank == rank):
                raise ConfigError(
                    f"{name} is {told!r} on rank {self.global_rank} of {self.world_size}; "
                    f"it must be True on rank {rank} and False elsewhere"
                )


class Unconnected:
    """The coordinator of ranks that have no process group: it says so when it is asked for anything."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def gather(self, value: Any, doing: str) -> list[Any]:
        """Raise ConfigError."""
        self._refuse(doing)

    def vote(self, error: BaseException | None, doing: str) -> None:
        """Raise ConfigError, or the error that this rank brings."""
        if error is not None:
            raise error
        self._refuse(doing)

    def _refuse(self, doing: str) -> NoReturn:
        raise ConfigError(
            f"{doing} needs all {self.world_size} processes of the runtime, but torch.distributed is not "
            "initialised: call torch.distributed.init_process_group first"
        )


def default_runtime(
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
    timeout: float = TIMEOUT,
) -> Runtime:
    """Return the runtime that torch.distributed tells; that of one process when it is not initialised.

    Args:
        device: By default the accelerator with this process's LOCAL_RANK, or the CPU where there is none.
        dtype: What floating-point tensors are to be; None for what the checkpoint says.
        process_group: The ranks that share the model; by default all.
        timeout: Seconds to wait for a rank that lives but does not come to a collective call.

    Raises:
        ConfigError: LOCAL_RANK has no accelerator.
    """
    where = usable_device(device) if device is not None else _default_device()
    rank, size = _place(process_group)
    return Runtime(
        where,
        dtype,
        rank,
        size,
        rank == 0,
        rank == size - 1,
        process_group,
        _control(rank, size, process_group, timeout),
        timeout,
    )


def as_runtime(obj: Any = None) -> Runtime:
    """Return an object with the attributes of a runtime as a `Runtime`; None gives the default one.

    Args:
        obj: A `Runtime`, or any object with device, dtype, global_rank, world_size, is_main_process and
            is_last_process. `process_group`, `control` and `timeout` are used where it has them.

    Raises:
        ConfigError: An attribute is missing, or they contradict each other or torch.distributed.
    """
    if obj is None:
        return default_runtime()
    if isinstance(obj, Runtime):
        return obj
    import torch

    missing = [name for name in REQUIRED if not hasattr(obj, name)]
    if missing:
        raise ConfigError(
            f"a {type(obj).__name__} cannot serve as runtime: it has no {', '.join(missing)}. "
            f"Needed are {', '.join(REQUIRED)}; default_runtime() gives all of them"
        )
    rank, size = _integer(obj, "global_rank"), _integer(obj, "world_size")
    group = getattr(obj, "process_group", None)
    timeout = float(getattr(obj, "timeout", None) or TIMEOUT)
    control = getattr(obj, "control", None)
    if obj.dtype is not None and not isinstance(obj.dtype, torch.dtype):
        raise ConfigError(f"the runtime's dtype is {obj.dtype!r}; it must be a torch.dtype or None")
    return Runtime(
        torch.device(obj.device),
        obj.dtype,
        rank,
        size,
        obj.is_main_process,
        obj.is_last_process,
        group,
        control or _control(rank, size, group, timeout),
        timeout,
    )


def usable_device(device: torch.device | str) -> torch.device:
    """Return a device, if this process can put a tensor there.

    Raises:
        ConfigError: It is no device, or this machine or this build of torch has none of that kind.
    """
    import torch

    try:
        found = torch.device(device)
        if found.type not in ("cpu", "meta"):
            torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"device {str(device)!r} cannot be used here: {reason}; leave device out to take an accelerator "
            'where there is one, or pass "cpu"'
        ) from error
    return found


def _integer(obj: Any, name: str) -> int:
    value = getattr(obj, name)
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"the runtime's {name} is {value!r}; it must be an integer") from None


def _place(group: ProcessGroup | None) -> tuple[int, int]:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        _warn_of_others()
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def _warn_of_others() -> None:
    """Warn where a launcher has started several processes, each of which takes itself for the only one."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and count not in ("0", "1"):
        warnings.warn(
            f"{count} processes were started (WORLD_SIZE), but torch.distributed is not initialised, so each "
            "of them works for itself, with all blocks: call torch.distributed.init_process_group() first",
            stacklevel=2,
        )


def _control(rank: int, size: int, group: ProcessGroup | None, timeout: float) -> Coordinator:
    if size == 1:
        return Solo()
    there = _place(group)
    if there == (0, 1):
        return Unconnected(rank, size)
    if there != (rank, size):
        raise ConfigError(
            f"the runtime says rank {rank} of {size}, torch.distributed says rank {there[0]} of {there[1]}"
        )
    return control_group(group, timeout=timeout)


def _default_device() -> torch.device:
    import torch

    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    local = os.environ.get("LOCAL_RANK")
    if local is None:
        index = torch.accelerator.current_device_index()
    else:
        index = 0 if count == 1 else int(local)  # a launcher may show each process its own device only
    if index >= count:
        raise ConfigError(f"LOCAL_RANK is {local}, but there are {count} devices; pass device=")
    return torch.device(kind.type if kind else "cpu", index)
