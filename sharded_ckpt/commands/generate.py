"""The subcommand `sharded-ckpt generate`."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchers.errors import ConfigError
from sharded_ckpt.commands.arguments import positive

if TYPE_CHECKING:
    from sharded_ckpt.runtime import Runtime

DESCRIPTION = """\
Continue prompts with a model whose blocks are shared out over the ranks that torchrun starts:
each loads its own blocks, and hidden states go from rank to rank. Without torchrun it is one
process that has the whole model.
"""
EPILOG = """\
example:
  sharded-ckpt generate --model DIR --prompt-file prompts.txt --sample --temperature 0.7 --seed 1

over several ranks:
  torchrun --nproc-per-node 2 -m sharded_ckpt generate --model DIR --prompt "The sea is"
  accelerate launch --cpu --num_processes 2 -m sharded_ckpt generate --model DIR --prompt "The sea is"
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add what to run, on which prompts, and how to choose tokens."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint folder, or a hub id")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    given.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line")
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    parser.add_argument("--temperature", type=_above_zero, metavar="T", help="for --sample")
    parser.add_argument("--top-p", type=_share, metavar="P", help="for --sample")
    parser.add_argument("--top-k", type=positive, metavar="K", help="for --sample")
    parser.add_argument("--seed", type=int, metavar="N", help="for --sample")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end where this text has been made")
    parser.add_argument(
        "--micro-batches",
        type=_micro_batches,
        default="auto",
        metavar="N",
        help='how many, or "auto": measured (the default)',
    )
    parser.add_argument("--dtype", metavar="NAME", help='such as "bfloat16"; by default the checkpoint\'s')
    parser.add_argument("--device", metavar="NAME", help="by default an accelerator, where there is one")
    parser.add_argument("--timeout", type=_seconds, default=600.0, metavar="S", help="for a silent rank")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[str, int]:
    """Generate, and return the texts on rank 0; the other ranks print nothing.

    Raises:
        ShardedCkptError: The model cannot be loaded, or a rank failed.
    """
    with _ranks(arguments) as runtime:
        prompts = arguments.prompt or _read_prompts(arguments.prompt_file)
        made = _generate(arguments, prompts, runtime)
        if not runtime.is_main_process:
            return "", 0
    if arguments.json:
        pairs = zip(prompts, made, strict=True)
        return json.dumps([{"prompt": p, "text": t} for p, t in pairs], ensure_ascii=False, indent=2), 0
    return "\n".join(made), 0


@contextmanager
def _ranks(arguments: argparse.Namespace) -> Iterator[Runtime]:
    """Meet the ranks that a launcher has started, if one has."""
    from datetime import timedelta

    import torch.distributed as dist

    from sharded_ckpt.runtime import default_runtime

    launched = "RANK" in os.environ
    if launched and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            "RANK is set and MASTER_ADDR is not, so the ranks cannot meet: start them with torchrun or "
            "accelerate (see --help), or unset RANK to work alone"
        )
    if launched:
        backend = "gloo" if arguments.device == "cpu" else None
        dist.init_process_group(backend, timeout=timedelta(seconds=arguments.timeout))
    try:
        yield default_runtime(device=arguments.device, timeout=arguments.timeout)
    finally:
        if launched:
            dist.destroy_process_group()


def _generate(arguments: argparse.Namespace, prompts: list[str], runtime: Runtime) -> list[str]:
    """Return what follows each prompt."""
    from sharded_ckpt.loading.verbs import load_and_shard_model
    from sharded_ckpt.pipeline import PipelineStage

    shard = load_and_shard_model("auto", arguments.model, runtime=runtime, dtype=arguments.dtype)
    stage = PipelineStage(shard, runtime)
    tokenizer = _tokenizer(arguments.model)
    texts = [_in_template(tokenizer, prompt) for prompt in prompts] if arguments.chat else prompts
    inputs = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=not arguments.chat)
    if not inputs["attention_mask"].any(dim=-1).all():
        raise ConfigError("a prompt is empty, and this tokenizer begins no text with a token: give some text")
    tokens = stage.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pad_token_id=tokenizer.pad_token_id,
        micro_batches=arguments.micro_batches,
        seed=arguments.seed,
        tokenizer=tokenizer,
        **_options(arguments),
    )
    made = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip("\n") for text in tokenizer.batch_decode(made, skip_special_tokens=True)]


def _read_prompts(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut within a line, too
        prompts = [line for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not a text in UTF-8, expected a prompt a line: {error}") from None
    if not prompts:
        raise ConfigError(f"{file}: there is no prompt in it, expected one a line")
    return prompts


def _tokenizer(model: str) -> Any:
    """Make the tokenizer of a checkpoint, which pads at the left.

    Raises:
        ConfigError: It has none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{model}: its files make no tokenizer ({reason}); put the tokenizer files of its parent beside "
            "the weights"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _in_template(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template; leave out --chat")
    said = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return text


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.sample}
    if arguments.stop:
        options["stop_strings"] = arguments.stop
    asked = {name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k")}
    return options | {name: value for name, value in asked.items() if value is not None}


def _micro_batches(text: str) -> Any:
    return text if text == "auto" else positive(text)


def _above_zero(text: str) -> float:
    return _between(text, 0, math.inf)


def _seconds(text: str) -> float:
    return _between(text, 0, 10**9)


def _share(text: str) -> float:
    return _between(text, 0, 1)


def _between(text: str, low: float, high: float) -> float:
    """Read a number above `low` and of at most `high`."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low < number <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above {low:g} and of at most {high:g}")
    return number
