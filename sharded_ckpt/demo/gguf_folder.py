"""A llama model in GGUF, quantised for llama.cpp, becomes an ordinary bf16 Hugging Face folder.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. transformers reads it too, through fp32
copies of the whole model; here one tensor at a time is dequantised and rounded to bf16, with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchers.errors import CheckpointError, ConfigError
from patchers.names import fold

from .shards import write_shards

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from numpy.typing import NDArray
    from transformers import LlamaConfig, PreTrainedTokenizerFast

_CONTROL = 3  # the token type of special tokens: LLAMA_TOKEN_TYPE_CONTROL of llama.cpp
_ROPE_THETA = "llama.rope.freq_base"
_CONFIG_FIELDS = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.rope.dimension_count",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "vocab_size": "llama.vocab_size",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def require_gguf() -> None:
    """Import the `gguf` package.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the demo's real weights come as GGUF, and the package that reads it is not installed: "
            'pip install "sharded-ckpt[demo]"'
        ) from error


def folder_from_gguf(
    gguf_file: Path, folder: Path, *, max_shard_size: str = "60MB", progress: bool = True
) -> None:
    """Fill `folder` with config, generation config, tokenizer and sharded bf16 weights with an index.

    Args:
        gguf_file: A model of the llama architecture with a byte-level BPE tokenizer.
        folder: An existing directory.
        max_shard_size: As in `save_pretrained`.
        progress: Show a bar.

    Raises:
        CheckpointError: The file's tensors are not those of its config.
        ConfigError: `gguf` is not installed, or the file holds another kind of model.
    """
    require_gguf()
    from gguf import GGUFReader
    from transformers import GenerationConfig

    reader = GGUFReader(gguf_file)
    metadata = Metadata(reader)
    config = llama_config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_shards(folder, dict(_tensors(reader, config, progress)), max_shard_size)
    tokenizer(metadata, config.max_position_embeddings).save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)
    config.save_pretrained(folder)


class Metadata(Mapping[str, Any]):
    """The key-value part of a GGUF file, each value decoded when it is asked for."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields
        self.path = reader.data.filename

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, key: str) -> Any:
        """Return the value of `key`, fp32 numbers as their shortest decimals (1e-05, not 9.99999974e-06).

        Raises:
            ConfigError: The file has no such key.
        """
        import numpy as np

        if key not in self._fields:
            raise ConfigError(f"{self.path} has no metadata {key!r}")
        value = self._fields[key].contents()
        return float(str(np.float32(value))) if isinstance(value, float) else value


def llama_config(metadata: Metadata, *, tied: bool) -> LlamaConfig:
    """Translate the metadata of a llama model.

    Raises:
        ConfigError: It is another architecture, or has settings that are not translated (scaled rope, say).
    """
    from transformers import LlamaConfig

    if metadata["general.architecture"] != "llama":
        raise ConfigError(f"{metadata.path} holds {metadata['general.architecture']!r}; only 'llama' is read")
    known = {_ROPE_THETA, *_CONFIG_FIELDS.values()}
    unknown = [key for key in metadata if key.startswith("llama.") and key not in known]
    if unknown:
        raise ConfigError(f"{metadata.path} has settings that are not translated: {', '.join(unknown)}")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": metadata[_ROPE_THETA]},
        **{field: metadata[key] for field, key in _CONFIG_FIELDS.items()},
    )


def tokenizer(metadata: Metadata, max_length: int) -> PreTrainedTokenizerFast:
    """Build the byte-level BPE tokenizer, with its chat template.

    Raises:
        ConfigError: It is another kind of tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ConfigError(f"{metadata.path} has the tokenizer {kind}; only ('gpt2', 'smollm') is read")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)  # "smollm": each digit alone, then as GPT-2
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    types = metadata["tokenizer.ggml.token_type"]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **{name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]] for name, key in named.items()},
        extra_special_tokens=[token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=metadata["tokenizer.chat_template"],
    )


def _tensors(reader: GGUFReader, config: LlamaConfig, progress: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and bf16 tensor, in the order of the native model, which also says names and shapes."""
    import torch
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map
    from tqdm.auto import tqdm

    theirs = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    wanted = _native_shapes(config)
    source = {key: str(theirs.get_name(key, try_suffixes=(".weight",))) for key in wanted}
    if set(source.values()) != set(stored):
        absent = [key for key, name in source.items() if name not in stored]
        extra = set(stored) - set(source.values())
        raise CheckpointError(
            f"{reader.data.filename} does not hold the tensors that its config asks for: "
            f"missing {fold(absent) or 'none'}, unexpected {fold(extra) or 'none'}"
        )
    for key, shape in tqdm(wanted.items(), desc="Dequantising", unit="tensor", disable=not progress):
        tensor = stored[source[key]]
        values = _unpermuted(key, dequantize(tensor.data, tensor.tensor_type), config)
        if values.shape != shape:
            raise CheckpointError(
                f"{tensor.name} in {reader.data.filename} is {values.shape}, expected {shape}"
            )
        yield key, torch.tensor(values, dtype=torch.bfloat16)


def _native_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a tied head once


def _unpermuted(key: str, values: NDArray[Any], config: LlamaConfig) -> NDArray[Any]:
    """Undo llama.cpp's order of query and key rows: its rotary pairs neighbours, transformers' halves."""
    by_module = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads = by_module.get(key.split(".")[-2])
    if heads is None:
        return values
    pairs = values.reshape(heads, -1, 2, values.shape[-1])  # (heads, head_dim / 2, 2, in)
    return pairs.swapaxes(1, 2).reshape(values.shape)
