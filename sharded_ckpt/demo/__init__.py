"""The demo: real weights if they can be had, and the text that it runs on."""

from .smollm2 import smollm2_folder
from .text import PARAGRAPH, PROMPT
from .tiny import tiny_folder
from .wheel import WeightsUnavailableError

__all__ = ["PARAGRAPH", "PROMPT", "WeightsUnavailableError", "smollm2_folder", "tiny_folder"]
