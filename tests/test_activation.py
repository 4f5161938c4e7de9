"""A class's `__init__` is exchanged for those who asked, and for nobody else."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from patchers.activation import patched_init, unpatched


class Thing:
    def __init__(self, value: int) -> None:
        self.value = value


class Special(Thing):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.special = True


def plus(amount: int) -> Any:
    def build(thing: Thing, true_init: Any, args: tuple[int, ...], kwargs: dict[str, int]) -> None:
        true_init(thing, *args, **kwargs)
        thing.value += amount

    return build


def in_thread(work: Any) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def test_builds_inside_and_restores_outside() -> None:
    true_init = Thing.__init__
    with patched_init((Thing,), plus(10)):
        assert Thing(1).value == 11
    assert Thing(1).value == 1
    assert Thing.__init__ is true_init


def test_restores_after_an_exception() -> None:
    true_init, start = Thing.__init__, threading.Thread.start
    with pytest.raises(KeyError), patched_init((Thing,), plus(10)):
        raise KeyError
    assert Thing.__init__ is true_init
    assert threading.Thread.start is start


def test_subclass_that_calls_super_is_covered() -> None:
    with patched_init((Thing,), plus(10)):
        assert Special(1).value == 11


def test_inherited_init_is_given_back_to_the_base() -> None:
    class Plain(Thing):
        pass

    with patched_init((Plain,), plus(10)):
        assert (Plain(1).value, Thing(1).value) == (11, 1)
    assert "__init__" not in vars(Plain)


def test_innermost_use_wins_and_the_outer_one_returns() -> None:
    with patched_init((Thing,), plus(10)):
        with patched_init((Thing,), plus(100)):
            assert Thing(1).value == 101
        assert Thing(1).value == 11


def test_unpatched_shuts_out_every_use() -> None:
    with patched_init((Thing,), plus(10)), unpatched():
        assert Thing(1).value == 1


def test_thread_started_inside_sees_the_use() -> None:
    with patched_init((Thing,), plus(10)):
        assert in_thread(lambda: Thing(1).value) == 11


def test_thread_started_before_does_not() -> None:
    go, results = threading.Event(), []
    thread = threading.Thread(target=lambda: (go.wait(10), results.append(Thing(1).value)))
    thread.start()
    with patched_init((Thing,), plus(10)):
        go.set()
        thread.join()
    assert results == [1]


def test_thread_that_outlives_the_use_no_longer_sees_it() -> None:
    go, results = threading.Event(), []
    thread = threading.Thread(target=lambda: (go.wait(10), results.append(Thing(1).value)))
    with patched_init((Thing,), plus(10)):
        thread.start()
    with patched_init((Thing,), plus(100)):
        go.set()
        thread.join()
    assert results == [1]


def test_two_threads_each_see_their_own() -> None:
    both_inside = threading.Barrier(2, timeout=10)

    def work(amount: int) -> int:
        with patched_init((Thing,), plus(amount)):
            both_inside.wait()
            made = Thing(0).value
            both_inside.wait()
        return made

    results: dict[int, int] = {}
    threads = [threading.Thread(target=lambda n=n: results.update({n: work(n)})) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {1: 1, 2: 2}
    assert Thing(0).value == 0


def test_signature_is_kept() -> None:
    import inspect

    with patched_init((Thing,), plus(10)):
        assert list(inspect.signature(Thing).parameters) == ["value"]
