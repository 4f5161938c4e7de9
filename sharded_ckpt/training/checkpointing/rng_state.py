"""The random number generators of a process as plain data: python's, numpy's, torch's, the accelerator's.

A state belongs to one rank of a number of ranks; on another number it is not loaded, and that is said.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt.runtime import as_runtime
from sharded_ckpt.training.plain import from_plain, to_plain

logger = logging.getLogger(__name__)

FORMAT: Final = "sharded_ckpt rng state"
_NAMES: Final = ("random_rng_state", "np_rng_state", "torch_rng_state", "accelerator_rng_state")


def rng_file(rank: int, module_name: str | None = None) -> str:
    """Return the file, in the directory of an iteration, that has the generators of one rank.

    Example:
        >>> rng_file(1), rng_file(0, "vision")
        ('rng/rank_00001.json', 'rng/vision.rank_00000.json')
    """
    return f"rng/{f'{module_name}.' if module_name else ''}rank_{rank:05d}.json"


def get_rng_state(
    data_parallel_random_init: bool = False,
    ckpt_format: str = "safetensors",
    *,
    pg_collection: Any = None,
    module_name: str | None = None,
    runtime: Any = None,
) -> dict[str, Any]:
    """Return the states of the random number generators of this process, as plain data.

    Args:
        data_parallel_random_init: Accepted for those who call it so: each rank's own state is always kept.
        ckpt_format: Accepted likewise: the result is the same for all formats.
        pg_collection: Accepted likewise: a state belongs to a rank, whatever groups it is in.
        module_name: Tells apart the states of several models that are saved to one directory.
        runtime: Where we are. By default torch.distributed says, or this is the only process.

    Raises:
        ConfigError: numpy's global generator is not the one that it comes with.

    Example:
        >>> state = get_rng_state()
        >>> first = random.random()
        >>> set_rng_state(state)
        >>> random.random() == first
        True
    """
    where = as_runtime(runtime)
    return {
        "format": FORMAT,
        "rank": where.global_rank,
        "world_size": where.world_size,
        "module_name": module_name,
        "states": _collect(),
    }


def set_rng_state(rng_state: Mapping[str, Any]) -> None:
    """Put the random number generators of this process where they were.

    An accelerator's state is left out where there is no accelerator now, or where there was none then.

    Args:
        rng_state: What `get_rng_state` gave, here or before.

    Raises:
        CheckpointError: It is something else; no generator was changed then.
    """
    states = _parsed(rng_state, "the state of random number generators")
    random.setstate(states["random_rng_state"])
    np.random.set_state(states["np_rng_state"])
    torch.set_rng_state(states["torch_rng_state"])
    kept, device = states["accelerator_rng_state"], _accelerator()
    if device is not None and kept is not None:
        device.set_rng_state(kept)
    elif device is not None or kept is not None:
        logger.warning(
            "the generator of the accelerator is not restored: %s",
            "the state was saved without one" if kept is None else "there is none now",
        )


def check_rng_state(
    rng_state: Any, rank: int, world_size: int, where: str = "the state of random number generators"
) -> bool:
    """Find out, before anything is changed, whether a state can be loaded on this rank.

    Args:
        rng_state: What was read.
        rank: This rank.
        world_size: Number of ranks.
        where: The file, for errors.

    Returns:
        False if it was saved on another number of ranks: then it is logged that generators stay as they are.

    Raises:
        CheckpointError: It is broken, or that of another rank.
    """
    _parsed(rng_state, where)
    if rng_state["world_size"] != world_size:
        logger.warning(
            "%s: saved on %d ranks, loaded on %d: the random number generators stay as they are, so what "
            "they draw from now on (dropout, shuffling) is not what it would have been",
            *(where, rng_state["world_size"], world_size),
        )
        return False
    if rng_state["rank"] != rank:
        raise CheckpointError(f"{where}: is the state of rank {rng_state['rank']}, read on rank {rank}")
    return True


def _collect() -> dict[str, Any]:
    version, numbers, spare = random.getstate()
    whole: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = whole
    if kind != "MT19937":
        raise ConfigError(f"numpy's global generator is {kind!r}; only MT19937, its default, can be saved")
    device = _accelerator()
    # bytes: JSON takes a hundred times as long for as many numbers
    states = {
        "random_rng_state": (version, np.array(numbers, "<u4").tobytes(), spare),
        "np_rng_state": (kind, keys.astype("<u4").tobytes(), *rest),
        "torch_rng_state": _bytes_of(torch.get_rng_state()),
        "accelerator_rng_state": None if device is None else _bytes_of(device.get_rng_state()),
    }
    return {name: to_plain(state) for name, state in states.items()}


def _parsed(rng_state: Any, where: str) -> dict[str, Any]:
    """Return the states in the form that the libraries take, each tried on a generator of its own."""
    if not isinstance(rng_state, Mapping) or rng_state.get("format") != FORMAT:
        raise CheckpointError(f"{where}: not the state of random number generators")
    said: Any = rng_state.get("states")
    if missing := [name for name in _NAMES if not isinstance(said, Mapping) or name not in said]:
        raise CheckpointError(f"{where}: has no {', '.join(missing)}")
    try:
        states = {name: from_plain(said[name]) for name in _NAMES}
        version, numbers, spare = states["random_rng_state"]
        kind, keys, *rest = states["np_rng_state"]
        kept = states["accelerator_rng_state"]
        parsed: dict[str, Any] = {
            "random_rng_state": (version, tuple(np.frombuffer(numbers, "<u4").tolist()), spare),
            "np_rng_state": (kind, np.frombuffer(keys, "<u4"), *rest),
            "torch_rng_state": _tensor(states["torch_rng_state"]),
            "accelerator_rng_state": None if kept is None else _tensor(kept),
        }
        random.Random().setstate(parsed["random_rng_state"])
        np.random.RandomState().set_state(parsed["np_rng_state"])
        torch.Generator().set_state(parsed["torch_rng_state"])
    except (TypeError, ValueError, LookupError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where}: no state that a generator takes: {error}") from None
    return parsed


def _accelerator() -> Any:
    """Return torch's module of the accelerator of this process; None if there is none with a generator."""
    device = torch.accelerator.current_accelerator(check_available=True)
    module = None if device is None else torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None


def _bytes_of(state: torch.Tensor) -> bytes:
    return bytes(state.cpu().numpy())


def _tensor(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
