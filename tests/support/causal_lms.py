"""The table of every causal language model of transformers: what was found out about it, or why not.

`PYTHONPATH=.:tests python -m support.causal_lms > docs/causal_lms.md` writes it anew.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from patchers import ModelDescriptor, capabilities
from patchers.errors import FamilyError
from patchers.meta import build_on_meta
from support.families import TEXT_FAMILIES, family_config

VERSION = ".".join(transformers.__version__.split(".")[:2])
ENTRIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TABLE = Path(__file__).parents[2] / "docs" / "causal_lms.md"
_LATENT = {"num_key_value_heads": 4}
_WINDOWED = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "deepseek_v32": _LATENT,
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": _LATENT,
    "gemma4_unified_text": TEXT_FAMILIES["gemma4_text"],
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "inkling2_loop_text": {
        **_WINDOWED,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "n_layers_per_attn_res_block": 1,
        "unpadded_vocab_size": 120,
    },
    "inkling2_text": {**_WINDOWED, "unpadded_vocab_size": 120},
    "inkling_text": _WINDOWED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "minicpm3": _LATENT,
    "plbart": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "sarvam_mla": _LATENT,
    "whisper": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "youtu": _LATENT,
    "zaya": {"num_experts_per_tok": 1},
}
"""What tiny configs of entries must say beside the common sizes."""
SIZES = {
    "query_heads": "query heads",
    "kv_heads": "KV heads",
    "ffn_width": "FFN width",
    "experts": "experts",
    "experts_per_token": "top-k",
    "expert_width": "expert width",
    "shared_expert_width": "shared expert width",
}
HEAD = """# Causal language models of transformers

Every entry of transformers' mapping of causal language models ({version}), built small on the meta device.
The descriptor is derived by rule, its parts are tried out, and its sizes are found by building layers twice.
The columns *removable* and *linear* say which parts a block can do without, or have a linear layer in place
of; *sizes* are those that one block may have otherwise than the others. Where nothing could be derived, the
last column says why: see [adding a family](adding_a_family.md).

What is claimed here is shown by running models: for the families of [families.md](families.md) in
`tests/test_family_heterogeneous.py`, for the others in `tests/test_causal_lms.py`. Every claim is had by a
layer of a model that equals one changed by hand; shards equal plain `from_pretrained` bit by bit; and where
the native model decodes with a cache as without, so does the heterogeneous one. The last column names the
entries that were derived on the meta device and not run.

| `model_type` | class | layers | parts | removable | linear | sizes | not derived, or not run |
|---|---|---|---|---|---|---|---|
"""
MILLIONS = 15


def not_run(entry: str) -> str:
    """Why a derived entry is not run, or nothing if it is."""
    config = small_config(entry)
    model_class = ModelDescriptor.from_config(config).model_class
    millions = build_on_meta(model_class, config, config.dtype).num_parameters() / 1e6
    return f"not run: its tiny config has {millions:.0f} million parameters" if millions > MILLIONS else ""


def row(entry: str) -> str:
    """The row of one entry of the mapping."""
    try:
        cells = [*_found(entry), not_run(entry)]
    except FamilyError as error:
        cells = [""] * 6 + [re.sub(r"\s+", " ", str(error)).replace("|", "/")[:160]]
    return f"| {' | '.join([f'`{entry}`', *cells])} |"


def small_config(entry: str) -> PreTrainedConfig:
    """A small config of an entry, or, where the common sizes do not go together, its own default one."""
    try:
        config = family_config(entry, **SETTINGS.get(entry, {}))
        ModelDescriptor.from_config(config).layer_kinds  # noqa: B018
        return config
    except Exception:  # transformers raises whatever a class raises that is given sizes it cannot have
        pass
    try:
        return CONFIG_MAPPING[entry]()
    except Exception as error:
        raise FamilyError(f"its default config cannot be made: {error}") from error


def committed_rows() -> dict[str, str]:
    """The rows of the committed table, by entry."""
    lines = TABLE.read_text().splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `") and "model_type" not in line}


def committed_version() -> str:
    """The transformers that the committed table is of."""
    return TABLE.read_text().split("causal language models (")[1].split(")")[0]


def _found(entry: str) -> Iterator[str]:
    config = small_config(entry)
    descriptor = ModelDescriptor.from_config(config)
    kinds = descriptor.layer_kinds
    can = capabilities(config, descriptor)
    parts = [" + ".join(part.name for part in (*kind.attention, *kind.ffn)) for kind in kinds]
    yield descriptor.model_class.__name__
    yield f"`{descriptor.layers}`"
    yield " / ".join(dict.fromkeys(parts))
    for kind in ("no_op", "linear"):
        yield ", ".join(name for name in ("attention", "ffn") if can[f"{kind}_{name}"] is True)
    yield ", ".join(name for cell, name in SIZES.items() if can[cell] is True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(HEAD.replace("{version}", VERSION) + "\n".join(map(row, ENTRIES)))
