"""What the demo reads and what it completes: one text for every model, so that losses can be compared.

Which FFN channels a child keeps is decided on another text than the one that its loss is taken of.
"""

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

CALIBRATION = (
    "Bread is made from flour, water, salt and yeast. The baker mixes them into a dough, lets it rest in "
    "a warm place until it has doubled, and shapes the loaves by hand. They bake for about forty minutes "
    "in a hot oven. When the crust is brown and sounds hollow, the bread is done. The moon goes around "
    "the earth in a little less than a month. Half of it is always lit by the sun, but we see that half "
    "from another side every night, so it seems to grow and shrink. In the spring the children planted "
    "beans along the fence. They watered them every evening, and pulled out the weeds. By July the plants "
    "were taller than the youngest of them, and there were enough beans for the whole street."
)
