"""What the demo reads and what it completes: one text for every model, so that losses can be compared."""

from __future__ import annotations

PROMPT = "The capital of France is"

PARAGRAPH = (
    "Every morning the old lighthouse keeper climbed the narrow stairs to the lamp room and looked out over "
    "the water. On clear days he could see the fishing boats leave the harbor, one after another, until they "
    "were only small white points on the horizon. He knew most of the crews by name, and he counted them "
    "again in the evening, when they came home. One night in November a heavy storm rolled in from the west. "
    "The wind broke two windows, the rain put out the fire in the stove, and the engine that turned the lamp "
    "stopped working. So the keeper turned the lamp by hand until the sun came up, and all of the boats "
    "returned safely."
)
