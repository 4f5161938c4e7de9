"""Tiny Hugging Face checkpoints: ordinary ones by transformers, heterogeneous ones tensor by tensor.

A folder is made once for each parent directory and each set of arguments, so a parent of session scope shares
it between tests; a test that changes files takes its own `tmp_path`, or a copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
Substitute = Literal["no_op", "linear"]
Block = tuple[int | Substitute, int | Substitute]  # (KV heads or a substitute, FFN width or a substitute)
Dialect = Literal["anymodel", "nemotron_nas"]

# One block of every kind.
BLOCKS: list[Block] = [
    (2, 96),
    ("no_op", 48),
    (1, "no_op"),
    ("linear", 96),
    (4, "linear"),
    ("no_op", "no_op"),
    (2, 32),
]
NEMOTRON_NAS_BLOCKS: list[Block] = [
    (2, 256),
    ("no_op", 512),
    (1, "no_op"),
    ("linear", 256),
    (4, "linear"),
    ("no_op", "no_op"),
    (2, 768),
]


def tiny_config(
    family: str = "llama", *, layers: int = 4, tied: bool = False, **config: Any
) -> PreTrainedConfig:
    """The config of a tiny model: hidden 64, 4 heads of 16, 2 KV heads, FFN 96, vocabulary 128."""
    settings = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return CONFIG_MAPPING[family](**(settings | config))


def tiny_model(
    family: str = "llama",
    *,
    layers: int = 4,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """A tiny native model in eval mode, every tensor drawn with a standard deviation of 0.3 (norms around 1).

    transformers' own initialisation (0.02, norms of exactly 1, biases of exactly 0) would hide a tensor that
    was swapped, left out or initialised anew. Two end tokens, so that a lost generation config shows.
    """
    native = tiny_config(family, layers=layers, tied=tied, **config)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(native, dtype=dtype)
    parameters = dict(model.named_parameters())
    drawn = draw({name: tuple(p.shape) for name, p in parameters.items()}, dtype, seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(drawn[name])
    model.generation_config.eos_token_id = [2, 3]
    return model.eval()


def tiny_checkpoint(
    tmp: Path,
    family: str = "llama",
    *,
    layers: int = 4,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    shards: int = 3,
    seed: int = 0,
    **config: Any,
) -> Path:
    """An ordinary checkpoint folder under `tmp`, written by `save_pretrained`.

    Args:
        tmp: The parent directory.
        family: A `model_type` of transformers; those in `FAMILIES` are tried.
        layers: Number of blocks.
        tied: Whether the head is the embedding.
        dtype: Of all weights.
        shards: Exact number of safetensors files; one file gets no index.
        seed: Of the weights.
        **config: Further fields of the family's config, or other values for those of `tiny_config`.
    """

    def write(folder: Path) -> None:
        model = tiny_model(family, layers=layers, tied=tied, dtype=dtype, seed=seed, **config)
        saved = {name: p.detach() for name, p in model.named_parameters()}  # a tied head is listed once
        model.save_pretrained(folder, max_shard_size=_shard_size(saved, shards))
        _expect_shards(folder, shards)

    return _once(tmp, write, family, layers, tied, dtype, shards, seed, sorted(config.items()))


def heterogeneous_checkpoint(
    tmp: Path,
    family: str = "llama",
    blocks: Sequence[Block] | None = None,
    *,
    dialect: Dialect = "anymodel",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    shards: int = 3,
    seed: int = 0,
    **config: Any,
) -> Path:
    """A checkpoint folder under `tmp` whose blocks differ, in its config and in the shapes of its tensors.

    Nothing of this project takes part: names and shapes come from one-block models of the native class.

    Args:
        tmp: The parent directory.
        family: A `model_type` of transformers; "llama" for `dialect="nemotron_nas"`.
        blocks: For each block the KV heads and the FFN width, or "no_op" or "linear" in their place. By
            default one of every kind.
        dialect: In which the config says it: "anymodel" keeps the family's `model_type`, "nemotron_nas" has
            that of the published Llama-Nemotron models (FFN widths are multiples of 256 there).
        tied: Whether the head is the embedding.
        dtype: Of all weights.
        shards: Exact number of safetensors files, always with an index.
        seed: Of the weights.
        **config: As for `tiny_checkpoint`.
    """
    blocks = list(blocks or (BLOCKS if dialect == "anymodel" else NEMOTRON_NAS_BLOCKS))
    base = tiny_config(family, layers=len(blocks), tied=tied, dtype=dtype, **config)

    def write(folder: Path) -> None:
        folder.mkdir()
        say = {"anymodel": _anymodel_config, "nemotron_nas": _nemotron_nas_config}[dialect]
        _write_json(folder / "config.json", say(base, blocks))
        generation = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
        _write_json(folder / "generation_config.json", generation)
        write_shards(folder, draw(block_shapes(base, blocks), dtype, seed), shards)

    return _once(tmp, write, family, blocks, dialect, tied, dtype, shards, seed, sorted(config.items()))


def block_shapes(base: PreTrainedConfig, blocks: Sequence[Block]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of these blocks holds, in the order of the model."""
    ends = _native_shapes(base, {})
    shapes = {"model.embed_tokens.weight": ends["model.embed_tokens.weight"]}
    for index, (attention, ffn) in enumerate(blocks):
        widths = {"num_key_value_heads": attention, "intermediate_size": ffn}
        native = _native_shapes(base, {k: v for k, v in widths.items() if isinstance(v, int)})
        square = (base.hidden_size, base.hidden_size)
        linear_attention = {"self_attn.linear_attn.weight": square}
        parts = _part(native, attention, "self_attn.", "input_layernorm.", linear_attention)
        parts |= _part(native, ffn, "mlp.", "post_attention_layernorm.", {"mlp.linear_mlp.weight": square})
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in parts.items()}
    tail = ("model.norm.weight",) if base.tie_word_embeddings else ("model.norm.weight", "lm_head.weight")
    return shapes | {name: ends[name] for name in tail}


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Write tensors as `model-0000r-of-0000n.safetensors` and an index, in exactly `shards` files."""
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=_shard_size(tensors, shards))
    for filename, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / filename, metadata={"format": "pt"})
    weight_map = split.tensor_to_filename or dict.fromkeys(tensors, "model.safetensors")
    index = {"metadata": split.metadata, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    _expect_shards(folder, shards)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder, read by safetensors alone."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _once(tmp: Path, write: Callable[[Path], None], family: str, *arguments: Any) -> Path:
    digest = hashlib.sha256(repr(arguments).encode()).hexdigest()[:12]
    folder = Path(tmp) / f"tiny-{family}-{digest}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=tmp) as stage:
            write(Path(stage) / "checkpoint")
            os.replace(Path(stage) / "checkpoint", folder)
    return folder


def draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, shape in shapes.items():
        mean = 1.0 if "norm" in name else 0.0
        drawn[name] = (mean + 0.3 * torch.randn(shape, generator=generator)).to(dtype)
    return drawn


def _native_shapes(base: PreTrainedConfig, widths: dict[str, int]) -> dict[str, tuple[int, ...]]:
    fields = base.to_dict() | widths | {"num_hidden_layers": 1}
    fields.pop("layer_types", None)  # one per block; the config makes it anew
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(base)(**fields))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _part(
    native: dict[str, tuple[int, ...]],
    kind: int | Substitute,
    module: str,
    norm: str,
    linear: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    own = {name.removeprefix("model.layers.0."): shape for name, shape in native.items()}
    norms = {name: shape for name, shape in own.items() if name.startswith(norm)}
    if kind == "no_op":
        return {}
    if kind == "linear":
        return norms | dict(linear)
    return norms | {name: shape for name, shape in own.items() if name.startswith(module)}


def _anymodel_config(base: PreTrainedConfig, blocks: Sequence[Block]) -> dict[str, Any]:
    attention_rest = {"llama4": None, "mamba": None, "sparsify": None, "weights_precision": "bf16"}
    ffn_rest = {"moe": None, "sparsify": None, "weights_precision": "bf16"}
    block_configs = [
        {
            "attention": _say("num_key_value_heads", attention) | attention_rest,
            "ffn": _say("intermediate_size", ffn) | ffn_rest,
            "parallel_blocks": None,
        }
        for attention, ffn in blocks
    ]
    with torch.device("meta"):
        architectures = [type(AutoModelForCausalLM.from_config(base)).__name__]
    return _json_of(base) | {"architectures": architectures, "block_configs": block_configs}


def _nemotron_nas_config(base: PreTrainedConfig, blocks: Sequence[Block]) -> dict[str, Any]:
    if base.model_type != "llama":
        raise ValueError(f"the blocks of nemotron-nas are those of llama, not of {base.model_type}")
    attention_rest = {"num_sink_tokens": None, "sparsify": None, "unshifted_sink": False}
    attention_rest |= {"use_prefill_window_in_sink_attention": False, "window_length": None}
    block_configs = [
        {
            "attention": _say("n_heads_in_group", _group(base, attention)) | attention_rest,
            "ffn": _say("ffn_mult", _ffn_mult(base, ffn)) | {"sparsify": None},
        }
        for attention, ffn in blocks
    ]
    theirs = _json_of(base)
    rope = theirs.pop("rope_parameters")
    for unknown in ("head_dim", "transformers_version"):  # not in the published configs
        theirs.pop(unknown, None)
    return theirs | {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "block_configs": block_configs,
        "intermediate_size": None,
        "model_type": "nemotron-nas",
        "num_key_value_heads": None,
        "rope_scaling": None,
        "rope_theta": rope["rope_theta"],
        "torch_dtype": theirs.pop("dtype"),
    }


def _json_of(config: PreTrainedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string())  # what save_pretrained writes


def _say(field: str, value: float | Substitute) -> dict[str, Any]:
    number = None if isinstance(value, str) else value
    return {field: number, "no_op": value == "no_op", "replace_with_linear": value == "linear"}


def _group(base: PreTrainedConfig, attention: int | Substitute) -> int | Substitute:
    return attention if isinstance(attention, str) else base.num_attention_heads // attention


def _ffn_mult(base: PreTrainedConfig, ffn: int | Substitute) -> float | Substitute:
    if isinstance(ffn, str):
        return ffn
    if ffn % 256:
        raise ValueError(f"nemotron-nas has FFN widths in multiples of 256, not {ffn}")
    return 3 * ffn / (2 * base.hidden_size)


def _shard_size(tensors: dict[str, torch.Tensor], shards: int) -> int:
    """The limit, in bytes, at which huggingface_hub splits these tensors into exactly `shards` files."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    for size in range(total // shards, total + 2, max(1, total // 500)):
        split = split_torch_state_dict_into_shards(tensors, max_shard_size=size)
        if len(split.filename_to_tensors) == shards:
            return size
    raise ValueError(f"{len(tensors)} tensors of {total} bytes cannot be split into exactly {shards} files")


def _expect_shards(folder: Path, shards: int) -> None:
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(found) != shards:
        raise ValueError(f"expected {shards} shards, transformers wrote {found}")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
