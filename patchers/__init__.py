"""What a block is: block configs, their dialects, and the patcher that builds them from native classes."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from patchers.block_config import AttentionConfig as AttentionConfig
    from patchers.block_config import BlockConfig as BlockConfig
    from patchers.block_config import FFNConfig as FFNConfig
    from patchers.block_config import MambaConfig as MambaConfig
    from patchers.block_config import MoEConfig as MoEConfig
    from patchers.capability import capabilities as capabilities
    from patchers.deci_x import deci_x_patcher as deci_x_patcher
    from patchers.descriptor import ModelDescriptor as ModelDescriptor
    from patchers.descriptor import register_descriptor as register_descriptor
    from patchers.dialects import Dialect as Dialect
    from patchers.dialects import parse_blocks as parse_blocks
    from patchers.dialects import read_block_configs as read_block_configs
    from patchers.dialects import write_block_configs as write_block_configs
    from patchers.inference import infer_block_configs as infer_block_configs
    from patchers.probe import LayerKind as LayerKind
    from patchers.probe import SubBlock as SubBlock

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "block_config": ("AttentionConfig", "BlockConfig", "FFNConfig", "MambaConfig", "MoEConfig"),
        "capability": ("capabilities",),
        "deci_x": ("deci_x_patcher",),
        "descriptor": ("ModelDescriptor", "register_descriptor"),
        "dialects": ("Dialect", "parse_blocks", "read_block_configs", "write_block_configs"),
        "inference": ("infer_block_configs",),
        "probe": ("LayerKind", "SubBlock"),
    },
)
