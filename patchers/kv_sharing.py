"""Which blocks of a model use the keys and values of other ones (gemma3n, gemma4, mistral_large4)."""

from __future__ import annotations

from typing import Any


def blocks_that_share(config: Any) -> list[int]:
    """Return the blocks that use keys and values of another one, and those that these may come from.

    Args:
        config: A transformers config. Its `kv_sharing_modes` say of each block whether it stores its keys and
            values ("store") or uses stored ones ("reuse…"). Since transformers 5.24 blocks store them
            even if none uses them: assistant models can ask for them.

    Example:
        >>> from types import SimpleNamespace
        >>> blocks_that_share(SimpleNamespace(kv_sharing_modes=[None, "store", "reuse"]))
        [1, 2]
        >>> blocks_that_share(SimpleNamespace(kv_sharing_modes=[None, "store"]))
        []
    """
    modes = getattr(config, "kv_sharing_modes", None) or ()
    is_used = any(mode and mode.startswith("reuse") for mode in modes)
    return [block for block, mode in enumerate(modes) if mode and is_used]
