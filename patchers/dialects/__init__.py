"""The notations in which configs say how blocks differ, read and written without loss where they can say it.

Nothing here reads files: configs come as mappings, as `json.load` gives them.
"""

from __future__ import annotations

from patchers.dialects.config_fields import (
    decoder_fields,
    parse_blocks,
    read_block_configs,
    write_block_configs,
)
from patchers.dialects.detection import CONFIG_FIELDS, detect_dialect, fields_present
from patchers.dialects.dialect import Dialect

__all__ = [
    "CONFIG_FIELDS",
    "Dialect",
    "decoder_fields",
    "detect_dialect",
    "fields_present",
    "parse_blocks",
    "read_block_configs",
    "write_block_configs",
]
