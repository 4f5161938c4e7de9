"""Votes and transfers among ranks: bounded in time, and with one verdict for all."""

from typing import TYPE_CHECKING

from patchers.lazy import lazy_exports

if TYPE_CHECKING:
    from sharded_ckpt.collective.control_group import CHUNK_BYTES as CHUNK_BYTES
    from sharded_ckpt.collective.control_group import TIMEOUT as TIMEOUT
    from sharded_ckpt.collective.control_group import ControlGroup as ControlGroup
    from sharded_ckpt.collective.control_group import chunks as chunks
    from sharded_ckpt.collective.control_group import control_group as control_group

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "control_group": (
            "CHUNK_BYTES",
            "ControlGroup",
            "TIMEOUT",
            "chunks",
            "control_group",
        ),
    },
)
