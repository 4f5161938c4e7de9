"""A transformers that nobody has tested is warned of, once."""

from __future__ import annotations

import warnings

import pytest

from patchers import versions
from patchers.errors import UntestedVersionWarning


@pytest.fixture(autouse=True)
def forget() -> None:
    versions.warn_if_untested.cache_clear()


def test_newer_minor_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "TESTED_TRANSFORMERS", (5, 1))
    with pytest.warns(
        UntestedVersionWarning, match=r"is newer than 5\.1, the newest version this was tested with"
    ):
        versions.warn_if_untested()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_if_untested()


@pytest.mark.parametrize("tested", [(5, 999), (6, 0)])
def test_tested_or_older_is_silent(monkeypatch: pytest.MonkeyPatch, tested: tuple[int, int]) -> None:
    monkeypatch.setattr(versions, "TESTED_TRANSFORMERS", tested)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_if_untested()
