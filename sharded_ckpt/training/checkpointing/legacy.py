"""What Megatron-LM's own checkpoints say of themselves, and the version that ours bear for its tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from patchers.errors import ConfigError, MegatronArgsError

CHECKPOINT_VERSION: Final = 3.0
"""The version of Megatron's state dicts whose layout `generate_state_dict` follows."""

_CHECKPOINT_VERSION: float | None = None

_SIZES: Final = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "encoder_tensor_model_parallel_size": 0,
    "encoder_pipeline_model_parallel_size": 0,
}


def set_checkpoint_version(value: float) -> None:
    """Set the version of the checkpoint that this process works with.

    Raises:
        ConfigError: Another one has been set before: two checkpoints cannot be mixed.
    """
    global _CHECKPOINT_VERSION
    if _CHECKPOINT_VERSION is not None and value != _CHECKPOINT_VERSION:
        raise ConfigError(
            f"checkpoint versions do not match: this process has loaded version {_CHECKPOINT_VERSION}, "
            f"now it is to be {value}"
        )
    _CHECKPOINT_VERSION = value


def get_checkpoint_version() -> float | None:
    """Return the version of the checkpoint that was loaded; None if none was."""
    return _CHECKPOINT_VERSION


def _extract_megatron_lm_args_from_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the arguments of a Megatron-LM training say, by the names of Megatron-Bridge's config.

    Args:
        state_dict: The content of `common.pt`, with `args`: a namespace or a dict.

    Raises:
        MegatronArgsError: There are no arguments in it. It is a `RuntimeError`.

    Example:
        >>> said = _extract_megatron_lm_args_from_state_dict({"args": {"tensor_model_parallel_size": 2}})
        >>> said["model"]["tensor_model_parallel_size"], said["checkpoint"]["save_optim"]
        (2, True)
    """
    args = state_dict.get("args")
    if args is None:
        found = ", ".join(map(str, list(state_dict)[:8])) or "nothing"
        raise MegatronArgsError(
            f"no checkpoint of Megatron-LM: expected its arguments under 'args', found {found}"
        )
    said = args if isinstance(args, Mapping) else vars(args)
    return {
        "model": {name: said.get(name, default) for name, default in _SIZES.items()},
        "checkpoint": {
            "save_optim": not said.get("no_save_optim", False),
            "save_rng": not said.get("no_save_rng", False),
            "fully_parallel_save": said.get("ckpt_fully_parallel_save", False),
        },
    }
