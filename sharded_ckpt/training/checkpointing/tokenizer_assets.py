"""The files of a tokenizer, saved with a checkpoint so that it can be used by itself."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any, Final

from sharded_ckpt.runtime import as_runtime

logger = logging.getLogger(__name__)

TOKENIZER_DIRECTORY: Final = "tokenizer"

_FILES: Final = {
    "BertWordPieceLowerCase": {"vocab_file": "vocab.txt"},
    "BertWordPieceCase": {"vocab_file": "vocab.txt"},
    "GPT2BPETokenizer": {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
    "SentencePieceTokenizer": {"tokenizer_model": "tokenizer.model"},
    "GPTSentencePieceTokenizer": {"tokenizer_model": "tokenizer.model"},
    "Llama2Tokenizer": {"tokenizer_model": "tokenizer.model"},
    "TikTokenizer": {"tokenizer_model": "tokenizer.json"},
    "NullTokenizer": {},
}
"""Of Megatron's tokenizers: which field of the config says where a file is, and what it is called here."""


def save_tokenizer_assets(
    tokenizer: Any, tokenizer_config: Any, checkpoint_path: str | os.PathLike[str], *, runtime: Any = None
) -> None:
    """Write a tokenizer to `tokenizer/` in a checkpoint; rank 0 does, others and None are a no-op.

    Args:
        tokenizer: One of transformers (or a processor, or anything with `save_pretrained`), or a wrapper that
            has such a one as `_tokenizer`.
        tokenizer_config: For other ones: with `tokenizer_type` and the paths of the files, as Megatron has
            it. A file that is not there, and a type that is not known, are logged and left out.
        checkpoint_path: The directory of the checkpoint.
        runtime: Where we are. By default torch.distributed says, or this is the only process.

    Raises:
        OSError: A file could not be written.
    """
    if tokenizer is None or not as_runtime(runtime).is_main_process:
        return
    target = Path(checkpoint_path) / TOKENIZER_DIRECTORY
    inner: Any = (
        tokenizer if hasattr(tokenizer, "save_pretrained") else getattr(tokenizer, "_tokenizer", None)
    )
    if hasattr(inner, "save_pretrained"):
        target.mkdir(parents=True, exist_ok=True)
        inner.save_pretrained(target)
        return
    kind = str(getattr(tokenizer_config, "tokenizer_type", None))
    if kind not in _FILES:
        logger.warning(
            "%s: the tokenizer is not saved: a %s has no save_pretrained, and tokenizer_type is %s, which is "
            "none of %s",
            *(checkpoint_path, type(tokenizer).__name__, kind, ", ".join(_FILES)),
        )
        return
    for field, name in _FILES[kind].items():
        _copy(getattr(tokenizer_config, field, None), field, target / name)


def _copy(source: str | os.PathLike[str] | None, field: str, target: Path) -> None:
    if source is None or not Path(source).is_file():
        logger.warning("%s is not saved: %s is %s, which is no file", target, field, source)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
