"""State dicts in Megatron's sections: made, filtered, and taken where a save gets one ready-made.

    {"checkpoint_version": 3.0, "iteration": 10, "model": {…}, "optimizer": {…}, "opt_param_scheduler": {…},
     "rng_state": {…}}

`save_checkpoint` itself does not need them: it writes what is on a rank from where it lies. They are for
those who own the training loop, or have let go of the model before they save (`prebuilt_state_dict`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, nn

from patchers.errors import ConfigError
from patchers.names import fold
from sharded_ckpt.training.adapters import is_adapter_name
from sharded_ckpt.training.checkpointing.config import CheckpointConfig
from sharded_ckpt.training.checkpointing.legacy import CHECKPOINT_VERSION
from sharded_ckpt.training.model_state import ModelState
from sharded_ckpt.training.optimized import from_flat
from sharded_ckpt.training.optimizer_state import OptimizerState
from sharded_ckpt.training.optimizer_table import OptimizerTable, ParamOptions
from sharded_ckpt.training.places import is_extra_state

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from sharded_ckpt.training.audit import FillReport

_MODEL_SECTION: Final = re.compile(r"model\d*")


def _is_model_section(section_key: str) -> bool:
    """Return whether a section holds a model: `model`, or `model` with a number.

    Example:
        >>> [key for key in ("model", "model12", "model_x", "optimizer") if _is_model_section(key)]
        ['model', 'model12']
    """
    return _MODEL_SECTION.fullmatch(section_key) is not None


def delete_extra_state(state_dict: Any) -> Any:
    """Remove the extra states of modules from the model's section, in place.

    Args:
        state_dict: With a section `model`, or a model's state dict itself. What is neither stays as it is.

    Returns:
        The same object.

    Example:
        >>> delete_extra_state({"model": {"norm.weight": 1, "norm._extra_state": 2}})
        {'model': {'norm.weight': 1}}
    """
    section = state_dict.get("model", state_dict) if isinstance(state_dict, Mapping) else None
    if isinstance(section, dict):
        for key in [key for key in section if is_extra_state(key)]:
            del section[key]
    return state_dict


def apply_peft_adapter_filter_to_state_dict(
    state_dict: Mapping[str, Any], peft_config: Any
) -> dict[str, Any]:
    """Return a state dict whose models are only their adapters; all other sections stay as they are.

    Args:
        state_dict: As `generate_state_dict` gives it.
        peft_config: What says which names belong to the adapter: a function, an object with
            `adapter_key_filter`, or a config of peft, whose biases and `modules_to_save` count, too.

    Raises:
        ConfigError: It is none of these.
    """
    owns = adapter_filter_of(peft_config)
    return {
        key: _adapter_of(section, owns)
        if _is_model_section(key) and isinstance(section, Mapping)
        else section
        for key, section in state_dict.items()
    }


def adapter_filter_of(peft_config: Any) -> Callable[[str], bool]:
    """Return what says whether a name belongs to an adapter.

    Raises:
        ConfigError: The config says nothing of it.
    """
    if callable(getattr(peft_config, "adapter_key_filter", None)):
        return lambda name: bool(peft_config.adapter_key_filter(name))
    if hasattr(peft_config, "peft_type"):
        bias = getattr(peft_config, "bias", "none")
        if bias == "lora_only":
            raise ConfigError(
                "peft's bias='lora_only' cannot be told from names alone: pass a function of the name, or "
                "save with ModelState(model, is_peft=True), which asks the model"
            )
        return lambda name: is_adapter_name(name) or (bias == "all" and name.endswith(".bias"))
    if callable(peft_config):
        return lambda name: bool(peft_config(name))
    raise ConfigError(
        f"a {type(peft_config).__name__} does not say which names belong to an adapter: pass a function, an "
        "object with adapter_key_filter(name), or a config of peft"
    )


def _generate_model_state_dict(
    model: nn.Module | Sequence[nn.Module],
    model_sd_kwargs: Mapping[str, Any] | None = None,
    ckpt_format: str = "torch_dist",
    *,
    pg_collection: Any = None,
) -> dict[str, Any]:
    """Return the section of the model.

    It is one section whatever parts there are here: the names in it are those of the whole model.

    Args:
        model: The model of this rank, or its parts.
        model_sd_kwargs: Passed to `ModelState` (`is_peft`, `cpu_offload`, …).
        ckpt_format: Accepted for those who call it so: names and tensors are the same for all formats.
        pg_collection: Accepted likewise: nothing is gathered.
    """
    return {"model": ModelState(model, **(model_sd_kwargs or {})).state_dict()}


def generate_state_dict(
    ckpt_cfg: CheckpointConfig,
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer | Sequence[Optimizer] | None,
    opt_param_scheduler: Any | None,
    rng_state: Mapping[str, Any] | None,
    iteration: int | None = None,
    optim_sd_kwargs: Mapping[str, Any] | None = None,
    model_sd_kwargs: Mapping[str, Any] | None = None,
    rerun_state: Mapping[str, Any] | None = None,
    *,
    pg_collection: Any = None,
) -> dict[str, Any]:
    """Return what a checkpoint is to hold of this rank. Tensors share memory with the model and optimizer.

    Args:
        ckpt_cfg: Says whether optimizers and random numbers belong to it.
        model: The model of this rank, or its parts.
        optimizer: None where nothing is trained.
        opt_param_scheduler: The learning-rate scheduler, if there is one.
        rng_state: What `get_rng_state` gave.
        iteration: The step.
        optim_sd_kwargs: Passed to `OptimizerState`.
        model_sd_kwargs: Passed to `ModelState`.
        rerun_state: Anything of the user's own that belongs to it.
        pg_collection: Accepted for those who call it so: nothing is gathered.

    Example:
        >>> config = CheckpointConfig(save="run", save_rng=False)
        >>> list(generate_state_dict(config, nn.Linear(2, 2), None, None, None, 10))
        ['checkpoint_version', 'iteration', 'model']
    """
    state: dict[str, Any] = {"checkpoint_version": CHECKPOINT_VERSION}
    if iteration is not None:
        state["iteration"] = iteration
    state |= _generate_model_state_dict(model, model_sd_kwargs, ckpt_cfg.ckpt_format)
    if ckpt_cfg.save_optim and optimizer is not None:
        said = OptimizerState(model, optimizer, opt_param_scheduler, **(optim_sd_kwargs or {}))
        kept = said.state_dict()
        state["optimizer"] = kept["optim"]
        state |= {"opt_param_scheduler": kept["sched"]} if "sched" in kept else {}
    if rerun_state is not None:
        state["rerun_state_machine"] = dict(rerun_state)
    if ckpt_cfg.save_rng and rng_state is not None:
        state["rng_state"] = rng_state
    return state


def _build_sharded_state_dict_metadata(
    use_distributed_optimizer: bool, cfg: CheckpointConfig
) -> dict[str, Any]:
    """Return what readers must know of how the state in files is cut: flat, by names that say what they mean.

    Args:
        use_distributed_optimizer: Accepted for those who call it so. Optimizer state is always whole in
            files, so that any number of ranks reads it.
        cfg: What the training wants.

    Example:
        >>> _build_sharded_state_dict_metadata(True, CheckpointConfig())["distrib_optim_sharding_type"]
        'fully_reshardable'
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "sharded_backend": cfg.ckpt_format,
    }


def _load_model_state_dict(module: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> FillReport:
    """Fill a model; of what one side lacks only extra states are let pass without a word.

    Args:
        module: The model.
        state_dict: Tensors by name.
        strict: Whether anything else that one side lacks is an error; if not, the report names it.

    Raises:
        CheckpointError: Something does not fit; nothing was filled.
    """
    return ModelState(module).load_state_dict(state_dict, strict)


class PrebuiltModel:
    """The models of a state dict that was made before, as something that is saved."""

    unowned: tuple[str, ...] | None = None
    ties: Mapping[str, str] = {}

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self._tensors: dict[str, Any] = {}
        for key in filter(_is_model_section, state_dict):
            section = state_dict[key]
            if twice := self._tensors.keys() & section.keys():
                raise ConfigError(
                    f"prebuilt_state_dict has {fold(sorted(twice))} in several models; names must be those "
                    "of the whole model"
                )
            self._tensors |= section

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors by name."""
        return dict(self._tensors)


class PrebuiltOptimizer:
    """The optimizers of a state dict that was made before, as something that is saved.

    Raises:
        ConfigError: There is state of parameters that its models do not have.
    """

    ties: Mapping[str, str] = {}

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        models = PrebuiltModel(state_dict).state_dict()
        self._tensors, table = from_flat(state_dict.get("optimizer") or {}, ())
        if strange := sorted(table.shapes.keys() - models.keys()):
            raise ConfigError(
                f"prebuilt_state_dict has optimizer state of {fold(strange)}, which its models do not have"
            )
        shapes = {name: tuple(models[name].shape) for name in table.shapes}
        groups = [
            ParamOptions({name: shapes[name] for name in one.shapes}, one.options) for one in table.groups
        ]
        self._table = replace(table, groups=tuple(groups), scheduler=state_dict.get("opt_param_scheduler"))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by key."""
        return self._tensors

    def table(self) -> OptimizerTable:
        """Return what there is besides tensors."""
        return self._table


def _adapter_of(section: Mapping[str, Any], owns: Callable[[str], bool]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if owns(name) and not is_extra_state(name)}
