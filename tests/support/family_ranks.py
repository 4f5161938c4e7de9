"""What the ranks of the family sweep do: run each family over themselves, and in one process beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from patchers.capability import layer_capabilities
from patchers.descriptor import ModelDescriptor
from sharded_ckpt.checkpoint.coordinator import together
from sharded_ckpt.model import create_local_shard_, num_blocks
from sharded_ckpt.pipeline import PipelineStage
from sharded_ckpt.runtime import Runtime, default_runtime
from support.by_hand import drawn, patched_model
from support.families import drawn_model, family_config

IDS = torch.randint(4, 128, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [1] * 9])
NEW_TOKENS = 3
BATCHED = {"paligemma"}  # its own model gives rows other tokens where no row of the batch is padded
WITHOUT_ATTENTION = (0, 3)  # the first blocks of some stages, in models of all kinds
UNTIED = {"dbrx"}  # its config refuses to be tied
ROUNDING = {"dbrx", "granitemoehybrid", "minimax", "zamba2"}
"""Families whose gradients smaller batches round otherwise, by up to 3e-4: no more than those of the whole
batch are from what float64 gives. In float64 both agree."""


@dataclass(frozen=True)
class Case:
    """How a model of each family is run.

    Attributes:
        owned: The blocks of each rank in a model of four; the last run goes on to the end of longer ones.
        model: Which one: "native", "tied", or "of all kinds", in which blocks differ.
        rows: Of the micro-batches.
    """

    owned: Sequence[Sequence[int]]
    model: str = "native"
    rows: Sequence[int] = (2, 1)


def compared_over_ranks(families: Sequence[str], cases: Mapping[str, Case]) -> dict[str, str]:
    """Return what differs from one process, or is raised, by family and case; nothing of those that agree.

    A case of fewer ranks is run by the first of them, while the others wait for the next one.
    """
    found, runtimes = {}, _runtimes(sorted({len(case.owned) for case in cases.values()}))
    for family in families:
        models = _models(family, runtimes[max(runtimes)].control)
        for name, case in cases.items():
            if len(case.owned) not in runtimes:
                continue
            try:
                what = _differing(family, models[case.model], case, runtimes[len(case.owned)])
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
            if what:
                found[f"{family}, {name}"] = what
    return found


def _models(family: str, control: Any) -> dict[str, PreTrainedModel]:
    """Return the whole models, the same on every rank. Collective: one rank finds out what blocks can be."""
    kinds: Any = None
    with together(control, "drawing blocks"):
        config = family_config(family)
        if control.rank == 0:
            kinds, able = drawn(config, seed=3), layer_capabilities(config)
            for block in WITHOUT_ATTENTION:
                if able[block]["no_op_attention"] is True:
                    kinds[block] = "no_op_attention", kinds[block][1]
    (kinds, *_) = control.gather(kinds, "telling which blocks were drawn")
    tied = family not in UNTIED
    return {
        "native": drawn_model(family_config(family, tie_word_embeddings=False)),
        "tied": drawn_model(family_config(family, tie_word_embeddings=tied)),
        "of all kinds": patched_model(config, list(map(tuple, kinds))),
    }


def _runtimes(sizes: Sequence[int]) -> dict[int, Runtime]:
    """Return those of the first ranks, so many as each size says, of which this one is one. Collective."""
    groups: dict[int, Any] = {size: dist.new_group(list(range(size))) for size in sizes if size > 1}
    shared = {
        size: default_runtime(device="cpu", timeout=60, process_group=group)
        for size, group in groups.items()
        if dist.get_rank() < size
    }
    alone = {1: Runtime(torch.device("cpu"))} if dist.get_rank() == 0 else {}
    return shared | alone


def trained_over_ranks(families: Sequence[str]) -> dict[str, str]:
    """Return, by family, the parameters whose gradients over two stages are not those of one process."""
    found = {}
    for family in families:
        try:
            what = _differing_gradients(family)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
        if what:
            found[family] = what
    return found


def _differing_gradients(family: str) -> str:
    precise = family in ROUNDING
    model = drawn_model(
        family_config(family, tie_word_embeddings=False), dtype=torch.float64 if precise else torch.float32
    )
    if precise and family != "zamba2":
        model.set_experts_implementation("eager")  # the others know no float64
    stage = _stage_of(model, [[0, 1], [2, 3]], default_runtime(device="cpu", timeout=60))
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
    loss = stage.train_step(batch, micro_batches=[2, 1])
    with torch.enable_grad():
        expected = model(**batch, use_cache=False).loss
    expected.backward()
    whole = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    differ = [] if abs(loss - expected) <= 1e-5 * expected.abs() else [f"loss {loss} and {expected}"]
    for name, parameter in stage.shard.named_parameters():
        of_whole = whole.get(name, torch.zeros(()))
        ours = torch.zeros(()) if parameter.grad is None else parameter.grad
        scale = max(of_whole.abs().max().item(), 1e-3 * largest)  # some are zero but for rounding
        if (ours - of_whole).abs().max().item() > 1e-5 * scale:
            differ.append(f"{name} by {(ours - of_whole).abs().max().item() / scale:.1g}")
    return ", ".join(differ)


def _differing(family: str, model: PreTrainedModel, case: Case, runtime: Runtime) -> str:
    stage = _stage_of(model, case.owned, runtime)
    rows = [len(IDS)] if family in BATCHED else case.rows
    output = stage(IDS, attention_mask=MASK, micro_batches=rows)
    options: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    tokens = stage.generate(IDS, micro_batches=rows, **options)
    told = runtime.control.gather(tokens.tolist(), "comparing tokens")
    if output is None:  # one process beside them is enough: that of the rank with the head
        return ""
    logits, expected = _logits(model, rows), model.generate(IDS, **options).tolist()
    differs = [f"tokens of rank {rank}" for rank, tokens in enumerate(told) if tokens != expected]
    if not torch.equal(output.logits, logits):
        differs.append(f"logits by {(output.logits - logits).abs().max() / logits.abs().max():.1g}")
    return ", ".join(differs)


def _stage_of(model: PreTrainedModel, owned: Sequence[Sequence[int]], runtime: Runtime) -> PipelineStage:
    descriptor, rank = ModelDescriptor.of("auto", model.config), runtime.global_rank
    last = max(number for number, run in enumerate(owned) if run)
    more = range(4, num_blocks(model, descriptor)) if rank == last else ()
    shard = create_local_shard_(copy.deepcopy(model), [*owned[rank], *more], descriptor)
    return PipelineStage(shard, runtime)


def _logits(model: PreTrainedModel, rows: Sequence[int]) -> torch.Tensor:
    parts = zip(IDS.split(list(rows)), MASK.split(list(rows)), strict=True)
    with torch.no_grad():
        return torch.cat([model(input_ids=ids, attention_mask=mask).logits for ids, mask in parts])
