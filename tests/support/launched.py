"""What the ranks of `test_launch.py` do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sharded_ckpt.launch import process_group
from sharded_ckpt.local_ranks import Place


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


def connected_and_begun(place: Place) -> tuple[float, float]:
    """Connect as a rank that is late, if it is the second one; tell when it was connected, and begun."""
    import torch.distributed as dist

    connect, connected = dist.init_process_group, []

    def late(*args: Any, **kwargs: Any) -> None:
        connect(*args, **kwargs)
        time.sleep(place.rank)
        connected.append(time.monotonic())

    dist.init_process_group = late
    with process_group(place, "gloo"):
        return connected[0], time.monotonic()


def tensors_of_rank() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    return {"rank": torch.full((1000,), dist.get_rank()), "ties": [torch.arange(3.0)] * 2}
