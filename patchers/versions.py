"""Which transformers this project was tested with."""

from __future__ import annotations

import functools
import warnings

import transformers

from patchers.errors import UntestedVersionWarning

TESTED_TRANSFORMERS = (5, 24)
"""The newest minor version with which the whole suite has passed."""


@functools.cache
def warn_if_untested() -> None:
    """Warn once if the installed transformers is a newer minor version than any that was tested."""
    installed = transformers.__version__
    if _minor(installed) > TESTED_TRANSFORMERS:
        tested = ".".join(map(str, TESTED_TRANSFORMERS))
        warnings.warn(
            f"transformers {installed} is newer than {tested}, the newest version this was tested with; "
            "compare a small model with plain transformers before you rely on it",
            UntestedVersionWarning,
            stacklevel=2,
        )


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
