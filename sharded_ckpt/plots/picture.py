"""A figure that is shown wherever it is looked at. Importing this imports matplotlib."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that pyplot does not keep, so nobody has to close it; a notebook shows it all the same."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()
