"""What the ranks of the family sweep do: run each family over themselves, and in one process beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from patchers.capability import layer_capabilities
from patchers.descriptor import ModelDescriptor
from patchers.native import text_config_of
from sharded_ckpt.model import create_local_shard_
from sharded_ckpt.pipeline import PipelineStage
from sharded_ckpt.runtime import default_runtime
from support.families import drawn_model, family_config
from support.by_hand import drawn, patched_model

Kinds = list[tuple[str, str]]

IDS = torch.randint(4, 128, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [1] * 9])
ROWS = [2, 1]
NEW_TOKENS = 3


def compared_over_ranks(
    families: Sequence[str], owned: Sequence[Sequence[int]], kinds: Mapping[str, Kinds] | None, tied: bool
) -> dict[str, str]:
    """Return, for each family that is not exact over these ranks, what differs or was raised.

    Args:
        families: Which ones.
        owned: The blocks of each rank in a model of four; the last run goes on to the end of longer ones.
        kinds: The blocks of each family; None for its own.
        tied: Whether head and embedding are one, where the family can have it so.
    """
    found = {}
    for family in families:
        try:
            what = _differing(_model(family, None if kinds is None else kinds[family], tied), owned)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
        if what:
            found[family] = what
    return found


def kinds_with_no_op_at(family: str, block: int) -> Kinds:
    """Blocks of a family, of any kinds that it can have, one of them without attention if it can."""
    kinds = drawn_kinds(family, seed=3)
    if layer_capabilities(family_config(family))[block]["no_op_attention"] is True:
        kinds[block] = "no_op_attention", kinds[block][1]
    return kinds


def _model(family: str, kinds: Kinds | None, tied: bool) -> PreTrainedModel:
    if kinds is not None:
        return patched_model(family, kinds)
    return drawn_model(family_config(family, tie_word_embeddings=tied))


def _differing(model: PreTrainedModel, owned: Sequence[Sequence[int]]) -> str:
    descriptor, rank = ModelDescriptor.of("auto", model.config), dist.get_rank()
    count = text_config_of(model.config).num_hidden_layers
    last = max(number for number, run in enumerate(owned) if run)
    mine = [*owned[rank], *(range(4, count) if rank == last else ())]
    shard = create_local_shard_(copy.deepcopy(model), mine, descriptor)
    stage = PipelineStage(shard, default_runtime(device="cpu", timeout=60))
    output = stage(IDS, attention_mask=MASK, micro_batches=ROWS)
    options: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    tokens = stage.generate(IDS, micro_batches=ROWS, **options)
    differs = []
    if output is not None:
        with torch.no_grad():
            parts = zip(IDS.split(ROWS), MASK.split(ROWS), strict=True)
            logits = torch.cat([model(input_ids=ids, attention_mask=mask).logits for ids, mask in parts])
        if not torch.equal(output.logits, logits):
            differs.append(f"logits by {(output.logits - logits).abs().max() / logits.abs().max():.1g}")
    if not torch.equal(tokens, model.generate(IDS, **options)):
        differs.append("tokens")
    return ", ".join(differs)
