"""The errors of this project: a small hierarchy off the built-ins.

Every message says what went wrong, which key (indices folded), which file, what was expected, what was found,
and what to try. `sharded_ckpt` re-exports these names.
"""

from __future__ import annotations


class ShardedCkptError(Exception):
    """The base of all errors that this project raises on purpose."""


class ConfigError(ShardedCkptError, ValueError):
    """A model config, a block config or an argument asks for something that cannot be had."""


class BlockConfigError(ConfigError):
    """Block configs are wrong, of the wrong number, or cannot be said in the dialect asked for."""


class FamilyError(ConfigError):
    """A model family is not supported, or does not support what was asked of it."""


class OwnershipError(ConfigError):
    """Blocks are assigned to ranks in an impossible way."""


class PatchError(ShardedCkptError, RuntimeError):
    """A patched build did not give the layers that the block configs describe."""


class CheckpointError(ShardedCkptError, ValueError):
    """The files of a checkpoint are broken, or contradict each other or the model."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint, or a file that its index names, does not exist."""


class MissingKeysError(CheckpointError):
    """Tensors that are needed are not in the checkpoint."""


class MegatronArgsError(CheckpointError, RuntimeError):
    """A checkpoint has none of Megatron-LM's arguments in it."""


class PartialModelError(ShardedCkptError, RuntimeError):
    """A shard that owns only some blocks was used as if it were the whole model."""


class ShardMemoryError(ShardedCkptError, MemoryError):
    """The blocks of a rank do not fit into its memory."""


class CollectiveError(ShardedCkptError, RuntimeError):
    """Some ranks failed in work that all ranks do together; every rank raises this same error.

    Attributes:
        failures: What each failed rank said, by rank.
        agreed: Whether the ranks have heard of it from each other already.
    """

    agreed = False

    def __init__(self, message: str, failures: dict[int, str] | None = None) -> None:
        super().__init__(message)
        self.failures = dict(failures or {})


class ManagerImportError(ConfigError, ImportError):
    """The module of a checkpoint manager cannot be imported."""


class ManagerAttributeError(ConfigError, AttributeError):
    """The module of a checkpoint manager has no such class."""


class ManagerTypeError(ConfigError, TypeError):
    """A class is no checkpoint manager."""


class UntestedVersionWarning(UserWarning):
    """A dependency is newer than any version this project was tested with."""
