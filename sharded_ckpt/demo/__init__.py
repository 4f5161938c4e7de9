"""The demo: real weights if they can be had, and a run of them over several ranks."""

from .fine_tuning import run_fine_tuning
from .run import run_demo
from .smollm2 import smollm2_folder
from .text import PARAGRAPH, PROMPT
from .tiny import tiny_folder
from .weights import Weights, find_weights
from .wheel import WeightsUnavailableError

__all__ = [
    "PARAGRAPH",
    "PROMPT",
    "Weights",
    "WeightsUnavailableError",
    "find_weights",
    "run_demo",
    "run_fine_tuning",
    "smollm2_folder",
    "tiny_folder",
]
