"""Trainings that are killed while they save, or save where others read; in a process of their own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from support.forks import fork
from support.storages import DeadlyStorage
from support.trainings import Training, config_of, equal


def die_at_every_operation(run: str) -> dict[str, int]:
    """Kill a training before the n-th operation of a save, for every n; each time the next one goes on."""
    config = config_of(Path(run), most_recent_k=1)
    Training(config).train(1).save()
    counts = {"died": 0, "before": 0, "after": 0}
    for number in range(1, 1000):
        resumed = Training(config)
        at, _ = resumed.load()
        left = resumed.everything()

        def save(number: int = number) -> None:
            training = Training(config)
            training.load()
            training.train(1).save(storage=DeadlyStorage(number))

        status = os.waitpid(fork(save), 0)[1]
        found = Training(config)
        step, _ = found.load()
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            assert step == at + 1
            return counts
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert step in (at, at + 1), f"operation {number}: resumed from {step} after {at}"
        if step == at:
            now = found.everything()
            assert all(equal(now[name], left[name]) for name in ("model", "optimizer", "progress"))
        counts["died"] += 1
        counts["before" if step == at else "after"] += 1
        found.train(1).save()
        hidden = [name for name in os.listdir(run) if name.startswith(".")]
        assert not hidden, f"operation {number}: left behind {hidden}"
    raise AssertionError("it never ends")


def load_while_another_saves(run: str, times: int) -> dict[str, int]:
    """Resume over and over from a run whose training goes on saving and keeps one checkpoint."""
    config = config_of(Path(run), most_recent_k=1)
    Training(config).train(1).save()

    def save() -> None:
        training = Training(config)
        training.load()
        for _ in range(times):
            training.train(1).save()

    pid, last, counts = fork(save), 0, {"loads": 0, "steps": 0}
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        training = Training(config)
        step, flops = training.load()
        assert step >= last, "time goes forward"
        assert flops == 100 * step
        assert training.scheduler.last_epoch == step
        assert all(int(state["step"]) == step for state in training.optimizer.state.values())
        counts["loads"] += 1
        counts["steps"] += step != last
        last = step
        if ended:
            assert status == 0
            assert last == times + 1
            return counts


def save_by_two(run: str, times: int) -> dict[str, int]:
    """Let two processes save into one run, steps of their own and the same ones; in the end it loads."""
    config = config_of(Path(run))
    logs = [Path(run).with_name(f"log{saver}") for saver in (0, 1)]

    def work(saver: int) -> None:
        training = Training(config)
        with logs[saver].open("a") as log:
            for number in range(times):
                training.state.train_state.step = 1 + number // 2 * (1 + saver)
                try:
                    training.save()
                    log.write("saved\n")
                except Exception as error:
                    log.write("refused\n" if "another save into" in str(error) else f"{error!r}\n")

    assert [os.waitpid(pid, 0)[1] for pid in [fork(lambda s=saver: work(s)) for saver in (0, 1)]] == [0, 0]
    assert Training(config).load()[0] > 0
    words = [word for log in logs for word in log.read_text().splitlines()]
    return {word: words.count(word) for word in words}
