"""The errors of this project, under the name where users of `sharded_ckpt` look for them."""

from patchers.errors import BlockConfigError as BlockConfigError
from patchers.errors import CheckpointError as CheckpointError
from patchers.errors import CheckpointNotFoundError as CheckpointNotFoundError
from patchers.errors import CollectiveError as CollectiveError
from patchers.errors import ConfigError as ConfigError
from patchers.errors import FamilyError as FamilyError
from patchers.errors import ManagerAttributeError as ManagerAttributeError
from patchers.errors import ManagerImportError as ManagerImportError
from patchers.errors import ManagerTypeError as ManagerTypeError
from patchers.errors import MegatronArgsError as MegatronArgsError
from patchers.errors import MissingKeysError as MissingKeysError
from patchers.errors import OwnershipError as OwnershipError
from patchers.errors import PartialModelError as PartialModelError
from patchers.errors import PatchError as PatchError
from patchers.errors import ShardedCkptError as ShardedCkptError
from patchers.errors import ShardMemoryError as ShardMemoryError
from patchers.errors import UntestedVersionWarning as UntestedVersionWarning
