"""What the ranks of `test_launch.py` do."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def generate(checkpoint: Path, prompt: list[list[int]]) -> dict[str, Any]:
    import torch

    from sharded_ckpt import PipelineStage, load_and_shard_model

    stage = PipelineStage(load_and_shard_model("auto", checkpoint))
    tokens = stage.generate(torch.tensor(prompt), max_new_tokens=4, do_sample=False)
    return {"blocks": stage.shard.load_report.blocks, "tokens": tokens.tolist()}


def fail_on_rank_1() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("no such block on rank 1")
    dist.barrier()
