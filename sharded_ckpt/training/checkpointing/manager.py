"""Who saves and loads the checkpoints of a training: the default manager, or one of the user's own."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from patchers.errors import ConfigError, ManagerAttributeError, ManagerImportError, ManagerTypeError
from sharded_ckpt.training.checkpointing.config import CheckpointConfig
from sharded_ckpt.training.checkpointing.contexts import CheckpointLoadContext, CheckpointSaveContext

if TYPE_CHECKING:
    from sharded_ckpt.training.checkpointing.train_state import GlobalState

_METHODS = ("save", "load", "finalize_async_saves")


class CheckpointCallbacks(Protocol):
    """Who is told of checkpoints. Every rank tells its own, and waits for it."""

    def on_checkpoint_save(self, checkpoint_path: str, state: GlobalState) -> None:
        """Be told that a checkpoint is in place, and counts."""


@runtime_checkable
class CheckpointManager(Protocol):
    """Saves and loads the checkpoints of a training. Every method is collective: all ranks call it.

    Args:
        checkpoint_config: What the training wants.
    """

    def __init__(self, checkpoint_config: CheckpointConfig) -> None: ...

    def save(self, ctx: CheckpointSaveContext, callback_manager: CheckpointCallbacks | None = None) -> None:
        """Save a checkpoint."""

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, float]:
        """Load the checkpoint that the config resolves to.

        Returns:
            The step, and the floating-point operations so far; (0, 0) where training begins.
        """

    def finalize_async_saves(
        self, state: GlobalState, blocking: bool = False, terminate: bool = False
    ) -> None:
        """Make checkpoints count whose files have been written in the background.

        Args:
            state: Which saves are in flight.
            blocking: Wait for them.
            terminate: Take no more of them afterwards.
        """


class DefaultCheckpointManager:
    """The manager that `save_checkpoint` and `load_checkpoint` make up.

    Args:
        checkpoint_config: What the training wants; that of the state must be the same one.

    Example:
        >>> manager = DefaultCheckpointManager(CheckpointConfig(save="runs/a"))
        >>> isinstance(manager, CheckpointManager), manager.checkpointing_context
        (True, {})
    """

    def __init__(self, checkpoint_config: CheckpointConfig) -> None:
        from sharded_ckpt.training.checkpointing.local import init_checkpointing_context

        self.checkpoint_config = checkpoint_config
        self._context = init_checkpointing_context(checkpoint_config)

    @property
    def checkpointing_context(self) -> dict[str, Any]:
        """What is kept from one save or load to the next."""
        return self._context

    def save(self, ctx: CheckpointSaveContext, callback_manager: CheckpointCallbacks | None = None) -> None:
        """Save a checkpoint: see `save_checkpoint`."""
        from sharded_ckpt.training.checkpointing.saving import save_checkpoint

        save_checkpoint(
            ctx.state,
            ctx.model,
            ctx.optimizer,
            ctx.opt_param_scheduler,
            ctx.num_floating_point_operations_so_far,
            self._context,
            non_persistent_ckpt=ctx.non_persistent_ckpt,
            train_data_iterator=ctx.train_data_iterator,
            pg_collection=ctx.pg_collection,
            callback_manager=callback_manager,
            module_name=ctx.module_name,
        )

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, float]:
        """Load the checkpoint that the config resolves to: see `load_checkpoint`."""
        from sharded_ckpt.training.checkpointing.loading import load_checkpoint

        return load_checkpoint(
            ctx.state,
            ctx.model,
            ctx.optimizer,
            ctx.opt_param_scheduler,
            ctx.strict,
            self._context,
            ctx.skip_load_to_model_and_opt,
            ctx.pg_collection,
            ctx.module_name,
            train_data_iterator=ctx.train_data_iterator,
        )

    def finalize_async_saves(
        self, state: GlobalState, blocking: bool = False, terminate: bool = False
    ) -> None:
        """Make checkpoints count whose files have been written: see `maybe_finalize_async_save`."""
        from sharded_ckpt.training.checkpointing.async_calls import maybe_finalize_async_save

        maybe_finalize_async_save(state, self.checkpoint_config, blocking, terminate)


def create_checkpoint_manager(checkpoint_config: CheckpointConfig) -> CheckpointManager:
    """Return the manager that a config asks for: the default one, or one of `custom_manager_class`.

    The name of a class is code to be run: it must come from whom you trust.

    Args:
        checkpoint_config: What the training wants.

    Raises:
        ConfigError: The name is not of the form `package.module.Class`. It is a `ValueError`.
        ManagerImportError: The module cannot be imported. It is an `ImportError`.
        ManagerAttributeError: The module has no such class. It is an `AttributeError`.
        ManagerTypeError: The class is no `CheckpointManager`. It is a `TypeError`.

    Example:
        >>> type(create_checkpoint_manager(CheckpointConfig(save="runs/a"))).__name__
        'DefaultCheckpointManager'
    """
    wanted = checkpoint_config.custom_manager_class
    if wanted is None:
        return DefaultCheckpointManager(checkpoint_config)
    kind = _imported(wanted) if isinstance(wanted, str) else wanted
    name = wanted if isinstance(wanted, str) else getattr(wanted, "__qualname__", repr(wanted))
    if not isinstance(kind, type):
        raise ManagerTypeError(f"custom_manager_class {name} is no class, but a {type(kind).__name__}")
    if missing := [method for method in _METHODS if not callable(getattr(kind, method, None))]:
        raise ManagerTypeError(
            f"custom_manager_class {name} is no CheckpointManager: it has no {', '.join(missing)}"
        )
    _check_signatures(kind, name)
    manager: CheckpointManager = kind(checkpoint_config)
    return manager


def _imported(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    if not module_name or not name or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(
            f"Invalid custom_manager_class format: {path!r}; expected package.module.Class, such as "
            "mypackage.checkpoint.MyCheckpointManager"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ManagerImportError(
            f"Could not import module {module_name} of custom_manager_class {path}: {error}"
        ) from error
    if not hasattr(module, name):
        raise ManagerAttributeError(f"Module {module_name} does not have class {name} (custom_manager_class)")
    return getattr(module, name)


def _check_signatures(kind: type, name: str) -> None:
    """Raise unless the methods can be called as the protocol says: later a checkpoint would be lost by it."""
    calls = {
        "__init__": (object(), object()),
        "save": (object(), object(), object()),
        "load": (object(), object()),
        "finalize_async_saves": (object(), object(), False, False),
    }
    for method, arguments in calls.items():
        try:
            inspect.signature(getattr(kind, method)).bind(*arguments)
        except TypeError as error:
            raise ManagerTypeError(
                f"custom_manager_class {name}: {method} cannot be called as CheckpointManager.{method} is: "
                f"{error}"
            ) from None
