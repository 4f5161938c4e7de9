"""Continue a prompt over ranks: torchrun --nproc-per-node 2 docs/generate.py MODEL "The sea is"."""

from __future__ import annotations

import sys

import torch.distributed as dist
from transformers import AutoTokenizer

from sharded_ckpt import PipelineStage, default_runtime, load_and_shard_model


def main(model: str, prompt: str) -> None:
    """Run on every rank that torchrun starts, or on none."""
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    runtime = default_runtime(timeout=120)
    shard = load_and_shard_model("auto", model, runtime=runtime)
    stage = PipelineStage(shard, runtime)
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = stage.generate(inputs.input_ids, max_new_tokens=32, do_sample=False)
    if runtime.is_main_process:
        text = tokenizer.decode(tokens[0], skip_special_tokens=True)
        sys.stdout.write(f"{shard.load_report}\n{text}\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3])
