"""Exchanging a class's `__init__` for a while, seen only by the code that asked for it.

The exchange itself is process-wide and counted; who is affected is a matter of context. Nested uses, two
threads with a use each, and threads that are started inside a use all see their own, and nobody else sees
any.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

Build = Callable[[Any, Callable[..., None], tuple[Any, ...], dict[str, Any]], None]
"""Builds an object in place of its `__init__`: called with the object, the true `__init__` and the
arguments."""


@dataclass(eq=False)
class _Use:
    """One `patched_init` block that is open (or was, when a thread that it started outlives it)."""

    classes: tuple[type, ...]
    build: Build
    open: bool = True


@dataclass
class _Exchange:
    """A class whose `__init__` is exchanged, for as many uses as are open."""

    true_init: Any
    own: bool
    uses: int = 0


_USES: ContextVar[tuple[_Use, ...]] = ContextVar("patched_init_uses", default=())
_LOCK = threading.RLock()
_EXCHANGES: dict[type, _Exchange] = {}


@contextmanager
def patched_init(classes: tuple[type, ...], build: Build) -> Iterator[None]:
    """Have objects of some classes built by `build`, here and in threads started here.

    Args:
        classes: Classes whose `__init__` is taken over; a subclass that calls `super().__init__` is covered.
        build: What runs instead. The innermost use for a class wins.
    """
    use = _Use(classes, build)
    with _LOCK:
        for cls in (*classes, threading.Thread):
            _take(cls)
    token = _USES.set((*_USES.get(), use))
    try:
        yield
    finally:
        use.open = False
        _USES.reset(token)
        with _LOCK:
            for cls in (*classes, threading.Thread):
                _give_back(cls)


@contextmanager
def unpatched() -> Iterator[None]:
    """Build objects as their classes do, whatever uses are open around."""
    token = _USES.set(())
    try:
        yield
    finally:
        _USES.reset(token)


def _take(cls: type) -> None:
    name, wrap = _hook(cls)
    if cls not in _EXCHANGES:
        _EXCHANGES[cls] = _Exchange(getattr(cls, name), name in vars(cls))
        setattr(cls, name, wrap(cls, getattr(cls, name)))
    _EXCHANGES[cls].uses += 1


def _give_back(cls: type) -> None:
    exchange = _EXCHANGES[cls]
    exchange.uses -= 1
    if exchange.uses:
        return
    del _EXCHANGES[cls]
    name, _ = _hook(cls)
    if exchange.own:
        setattr(cls, name, exchange.true_init)
    else:
        delattr(cls, name)


def _hook(cls: type) -> tuple[str, Callable[[type, Any], Any]]:
    return ("start", _carrying_start) if cls is threading.Thread else ("__init__", _redirected_init)


def _redirected_init(cls: type, true_init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(true_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        use = next((use for use in reversed(_USES.get()) if use.open and cls in use.classes), None)
        if use is None:
            true_init(self, *args, **kwargs)
        else:
            use.build(self, true_init, args, kwargs)

    return __init__


def _carrying_start(cls: type, true_start: Callable[..., None]) -> Callable[..., None]:
    """A new thread begins with an empty context: hand it the uses of the thread that starts it."""

    @functools.wraps(true_start)
    def start(self: threading.Thread) -> None:
        uses, run = _USES.get(), self.run

        def run_inside() -> None:
            _USES.set(uses)
            run()

        if uses:
            self.run = run_inside  # type: ignore[method-assign]
        true_start(self)

    return start
