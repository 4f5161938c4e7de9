"""A stand-in for when real weights cannot be had: a small llama with random weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import cached_folder
from .shards import write_shards

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

_END = "<|end|>"
_RECIPE = 1  # raised whenever the same seed would give another folder
_README = """\
A llama of 8 blocks with RANDOM weights (seed {seed}), made by the demo of sharded-ckpt because real ones
could not be had. It shows how blocks are loaded and shared out, exactly; the text that it writes means
nothing, and neither does its loss.
"""


def tiny_folder(path: str | os.PathLike[str], seed: int = 0) -> Path:
    """Return a Hugging Face folder of a small llama with random weights, made at `path` if not there.

    8 blocks, hidden 128, FFN 256, 4 heads with 2 KV heads, tied embeddings, bf16, 3 safetensors files with an
    index (2.4 MB), and a tokenizer of single bytes, which reads any text. A README.md says that it is random.

    Args:
        path: The folder to make.
        seed: Of the weights; equal seeds give equal bits.

    Raises:
        ConfigError: Something else is at `path`.
    """

    def make(folder: Path) -> None:
        _fill(folder, seed)
        (folder / "README.md").write_text(_README.format(seed=seed))

    return cached_folder(Path(path), {"recipe": _RECIPE, "weights": "random", "seed": seed}, make)


def _fill(folder: Path, seed: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = _byte_tokenizer()
    config = _config(vocab_size=len(tokenizer), end=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied_once = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_shards(folder, tied_once, max_shard_size="1MB")
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(vocab_size: int, end: int) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,  # with the usual 0.02 a block is too weak for its loss to show
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), _END]
    characters = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        bos_token=_END,
        eos_token=_END,
        pad_token=_END,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
