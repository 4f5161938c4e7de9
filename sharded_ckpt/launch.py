"""A function on several ranks of this machine, from a notebook or a script: what `torchrun` is to a shell."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from patchers.errors import ConfigError

from .local_ranks import Place, on_ranks


def run_on_ranks(
    function: Callable[..., Any], *arguments: Any, ranks: int = 2, timeout: float = 600.0
) -> list[Any]:
    """Call `function(*arguments)` on each of several ranks at once, and return what they return.

    Each rank is a fresh process: the caller's threads and models are not inherited. torch.distributed is
    initialised in it before the call, so that `load_and_shard_model` and `PipelineStage` find their ranks.
    LOCAL_RANK is set, so that each takes an accelerator of its own where there are any. The processes print
    nothing and end with the call, or with the caller, whichever is first.

    Args:
        function: A function of a module that the processes can import. Not one of a notebook's cell: write it
            to a file (`%%writefile my_work.py`) and import it.
        arguments: These, and what the function returns, must pickle.
        ranks: How many processes; the cores are shared out among them.
        timeout: Seconds for everything, the imports of torch and transformers included (some 10 seconds).

    Returns:
        The results, in the order of the ranks.

    Raises:
        CollectiveError: Ranks raised, died or did not answer in time; it says which and why.
        ConfigError: The function cannot be imported by another process.

    Example:
        >>> import os
        >>> run_on_ranks(os.getenv, "LOCAL_RANK", ranks=2)
        ['0', '1']
    """
    if ranks < 1:
        raise ConfigError(f"ranks={ranks}: expected 1 or more")
    _check_importable(function)
    return on_ranks(_call_in_group, [function, arguments], world_size=ranks, timeout=timeout)


def share_cores(world_size: int) -> None:
    """Give each process of a machine its part of the cores, unless the environment decides."""
    # Ranks of a pipeline often run in turns, so each could take all cores; but idle OpenMP threads spin, and
    # where anything else wants the cores, that makes the turns several times longer.
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // world_size))


@contextmanager
def process_group(place: Place, backend: str | None = None) -> Iterator[None]:
    """Initialise torch.distributed among processes started together; destroy it where all goes well."""
    import torch.distributed as dist

    from sharded_ckpt.collective.control_group import control_group

    dist.init_process_group(
        backend,
        init_method=f"file://{place.meeting}",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=place.timeout),
    )
    # A rank that has nothing to do would be gone while others still connect to it, and they would fail.
    control_group(timeout=place.timeout).vote(None, "connecting the ranks")
    yield
    dist.destroy_process_group()  # not after an error: its cut connections would look like the cause


def _call_in_group(place: Place, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    os.environ["LOCAL_RANK"] = str(place.rank)
    share_cores(place.world_size)
    with process_group(place):
        return function(*arguments)


def _check_importable(function: Callable[..., Any]) -> None:
    name = getattr(function, "__qualname__", repr(function))
    module = getattr(function, "__module__", None)
    on_the_prompt = module == "__main__" and not hasattr(sys.modules["__main__"], "__file__")
    if on_the_prompt or "<" in name:
        raise ConfigError(
            f"{name} cannot run on ranks: each is a process of its own that imports the function by its "
            "name, and this one is not in a file. Write it to one (in a notebook: %%writefile my_work.py) "
            "and import it from there."
        )
