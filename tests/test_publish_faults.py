"""Whatever fails, and whoever dies: the old checkpoint or the new one, whole, and no litter that stays."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import killing, saving_ranks
from support.checkpoints import files_in, fill, recovered_version, save_version, version_in
from support.forks import run_apart
from support.gloo import Gloo, RankFailure
from support.storages import FaultyStorage, NoExchange, OnlyInside, WatchedStorage
from support.threads import ThreadRank, run_ranks

from patchers.errors import CheckpointError, CollectiveError
from sharded_ckpt.checkpoint import owner, storage, workspace
from sharded_ckpt.checkpoint.commit import PUBLISHED, UNTOUCHED
from sharded_ckpt.checkpoint.owner import Owner
from sharded_ckpt.checkpoint.publish import recover, transaction
from sharded_ckpt.checkpoint.storage import OPERATIONS, LocalStorage

MODES = ["new", "exchange", "name by name", "inside"]
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def no_save_goes_on() -> Iterator[None]:
    yield
    assert owner._alive_here == set()


class FaultyNoExchange(FaultyStorage, NoExchange):
    def exchange(self, first: Any, second: Any) -> None:
        self._enter("exchange")
        NoExchange.exchange(self, first, second)


class FaultyInside(FaultyStorage, OnlyInside):
    def make_directory(self, path: Any) -> None:
        self._enter("make_directory")
        OnlyInside.make_directory(self, path)


def faulty(mode: str, directory: Path, *args: Any, **options: Any) -> FaultyStorage:
    kinds = {"inside": FaultyInside, "name by name": FaultyNoExchange}
    storage = kinds.get(mode, FaultyStorage)(*args, durable=False, **options)
    storage.directory = str(directory)  # type: ignore[attr-defined]
    return storage


def healthy(mode: str, directory: Path) -> LocalStorage:
    kinds = {"inside": OnlyInside, "name by name": NoExchange}
    storage = kinds.get(mode, LocalStorage)(durable=False)
    storage.directory = str(directory)  # type: ignore[attr-defined]
    return storage


def litter(parent: Path) -> list[str]:
    return [name for name in files_in(parent) if any(part.startswith(".") for part in name.split("/"))]


def attempt(save: Callable[..., None], *args: Any, **options: Any) -> BaseException | None:
    try:
        save(*args, **options)
    except BaseException as error:
        return error
    return None


def rounds(tmp_path: Path, mode: str) -> Iterator[tuple[int, Path, int | None, int]]:
    """Yield 1, 2, ...; a directory; the version that it holds; that to be saved. Ends with a sound save."""
    parent, old = tmp_path, None
    for number in itertools.count(1):
        if mode == "new":
            parent, old = tmp_path / str(number), None
            parent.mkdir()
        elif old is None:
            save_version(parent / "ckpt", 0, durable=False)
            old = 0
        yield number, parent / "ckpt", old, 2 * number
        old = 2 * number + 1
        save_version(parent / "ckpt", old, storage=healthy(mode, parent / "ckpt"))
        assert version_in(parent / "ckpt") == old
        assert not litter(parent), "the next save sweeps"


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        *((mode, NO_SPACE) for mode in MODES),
        ("exchange", KeyboardInterrupt()),
        *(
            pytest.param(mode, KeyboardInterrupt(), marks=pytest.mark.slow)
            for mode in MODES
            if mode != "exchange"
        ),
    ],
    ids=str,
)
def test_any_operation_may_fail_once(tmp_path: Path, mode: str, error: BaseException) -> None:
    counts = {"old": 0, "new": 0}
    for number, ckpt, old, new in rounds(tmp_path, mode):
        storage = faulty(mode, ckpt, number, error)
        raised = attempt(save_version, ckpt, new, storage=storage)
        if not storage.failed:
            assert raised is None
            break
        found, operation = version_in(ckpt), storage.log[number - 1]
        if raised is None:
            assert found == new, f"{operation} {number} was survived"
        else:
            assert type(raised) is type(error)
            assert found in (old, new), f"operation {number}, {operation}"
            if isinstance(raised, OSError):
                assert (UNTOUCHED if found == old else PUBLISHED) in str(raised)
        counts["new" if found == new else "old"] += 1
        cleaning = operation in ("rename", "list", "unlink", "remove_directory")
        assert found == new or cleaning or not litter(ckpt.parent)
    assert counts["old"] > 25
    assert counts["new"] > 2


@pytest.mark.parametrize(
    "mode", ["exchange", *(pytest.param(m, marks=pytest.mark.slow) for m in MODES if m != "exchange")]
)
def test_the_disk_may_fail_for_good_at_any_operation(tmp_path: Path, mode: str) -> None:
    for number, ckpt, old, new in rounds(tmp_path, mode):
        broken = OSError(errno.EIO, "Input/output error")
        storage = faulty(mode, ckpt, number, broken, forever=True)
        raised = attempt(save_version, ckpt, new, storage=storage)
        if not storage.failed:
            break
        found = recovered_version(ckpt)
        assert found in (old, new)
        assert found == new or raised is not None


@pytest.mark.parametrize("mode", ["new", "exchange", "name by name"])
@pytest.mark.parametrize("faulty_rank", [0, 2])
def test_any_operation_of_any_rank_may_fail(tmp_path: Path, mode: str, faulty_rank: int) -> None:
    names: set[str] = set()
    for number, ckpt, old, new in rounds(tmp_path, mode):
        storage = faulty(mode, ckpt, number, NO_SPACE)

        def work(rank: ThreadRank, ckpt: Path, version: int, storage: LocalStorage) -> None:
            mine = storage if rank.rank == faulty_rank else healthy(mode, ckpt)
            with transaction(ckpt, rank, storage=mine) as save:
                fill(save, version, rank.rank, rank.world_size)

        errors = run_ranks(3, partial(work, ckpt=ckpt, version=new, storage=storage))
        if not storage.failed:
            break
        names.add(storage.log[number - 1])
        found = version_in(ckpt)
        if errors == [None] * 3:
            assert found == new
            continue
        assert [type(error) for error in errors] == [CollectiveError] * 3
        assert len({str(error) for error in errors}) == 1
        assert list(errors[0].failures) == [faulty_rank]
        assert "No space left on device while" in str(errors[0])
        assert found in (old, new)
    assert {"create", "write", "sync", "close"} <= names
    assert faulty_rank or {"rename", "list", "unlink"} <= names


def test_every_operation_of_the_storage_is_put_to_the_test(tmp_path: Path) -> None:
    seen: set[str] = set()
    for kind in (WatchedStorage, type("Watched", (NoLinks, WatchedStorage), {})):
        storage = kind(durable=False)
        ckpt = tmp_path / kind.__name__
        for version in (1, 2):
            save_version(ckpt, version, storage=storage)
            (ckpt / "notes").write_text("")
            (ckpt / "empty").mkdir(exist_ok=True)
            (ckpt / "stray").write_text("")
            if version == 1:
                (ckpt / "link").symlink_to("notes")
        seen.update(storage.log)
    with transaction(tmp_path / "x", storage=storage) as save:
        (save.path / "by_hand").write_text("")
    durable = WatchedStorage()
    with transaction(tmp_path / "y", storage=durable) as save:
        save.write_tensors({"large": torch.zeros(3 << 20)})
    seen.update(storage.log, durable.log)
    assert seen == set(OPERATIONS)


class NoLinks(LocalStorage):
    """A file system without hard links."""

    def link(self, source: Any, target: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", os.fspath(source))


def test_without_hard_links_names_change_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ckpt = tmp_path / "ckpt"
    save_version(ckpt, 1)
    (ckpt / "sub" / "empty").mkdir(parents=True)
    (ckpt / "sub" / "notes").write_text("mine")
    inode = os.stat(ckpt / "sub" / "notes").st_ino
    save_version(ckpt, 2, storage=NoLinks())
    assert version_in(ckpt) == 2
    assert os.stat(ckpt / "sub" / "notes").st_ino == inode
    assert (ckpt / "sub" / "empty").is_dir()
    assert "notes cannot be linked (Operation not permitted)" in caplog.text
    assert not litter(tmp_path)


def test_a_file_that_others_remove_meanwhile_does_not_fail_the_save(tmp_path: Path) -> None:
    ckpt = tmp_path / "ckpt"
    save_version(ckpt, 1)
    (ckpt / "passing").write_text("")

    class Storage(LocalStorage):
        def link(self, source: Any, target: Any) -> None:
            (ckpt / "passing").unlink(missing_ok=True)
            super().link(source, target)

    save_version(ckpt, 2, storage=Storage())
    assert version_in(ckpt) == 2
    assert not (ckpt / "passing").exists()


@pytest.mark.parametrize("mode", ["exchange", "name by name"])
def test_a_file_never_takes_the_place_of_a_directory(tmp_path: Path, mode: str) -> None:
    ckpt = tmp_path / "ckpt"
    (ckpt / "config.json").mkdir(parents=True)
    (ckpt / "config.json" / "notes").write_text("mine")
    (ckpt / "optim").write_text("a file")

    def save(name: str) -> None:
        with transaction(ckpt, storage=healthy(mode, ckpt)) as staged:
            staged.write_json(name, {})

    for name, clash in [("config.json", "config.json"), ("optim/state.json", "optim")]:
        with pytest.raises(CheckpointError, match=f"{clash} would have to be a file and a directory"):
            save(name)
    assert files_in(tmp_path) == ["ckpt/config.json/notes", "ckpt/optim"]


def test_a_save_that_cannot_be_finished_is_not_passed_over(tmp_path: Path) -> None:
    ckpt = tmp_path / "ckpt"
    save_version(ckpt, 1)

    class NoRenamesThere(NoExchange):
        def rename(self, source: Any, target: Any) -> None:
            if str(target).startswith(f"{ckpt}/"):
                raise OSError(errno.EIO, "Input/output error")
            super().rename(source, target)

    with pytest.raises(OSError, match="the new checkpoint is complete, the next save"):
        save_version(ckpt, 2, storage=NoRenamesThere())
    text = "an earlier save into .*ckpt died while it was published, and cannot be finished: .*Input/output"
    for _ in range(2):
        with pytest.raises(CheckpointError, match=text):
            save_version(ckpt, 3, storage=NoRenamesThere())
    assert version_in(ckpt) == 1
    save_version(tmp_path / "other", 1, storage=NoRenamesThere())
    recover(ckpt)
    assert version_in(ckpt) == 2
    assert not litter(tmp_path)


class NoLocks(LocalStorage):
    """A file system without locks."""

    def lock(self, path: Any) -> None:
        return None


def test_saves_without_locks_exclude_each_other_too(tmp_path: Path) -> None:
    with transaction(tmp_path / "ckpt", storage=NoLocks()) as staged:
        fill(staged, 1)
        with pytest.raises(CheckpointError, match="another save into"):
            save_version(tmp_path / "ckpt", 2, storage=NoLocks())
    assert version_in(tmp_path / "ckpt") == 1


def test_somebody_frozen_in_a_lock_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LOCK_WITHIN", 0.1)
    held = LocalStorage().lock(tmp_path)
    assert held is not None
    began = time.monotonic()
    save_version(tmp_path / "ckpt", 1)
    assert time.monotonic() - began < 5
    LocalStorage().unlock(held)


# Death --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["new", "exchange", "name by name"])
def test_a_saver_may_be_killed_before_any_operation(tmp_path: Path, mode: str) -> None:
    counts = run_apart(killing.die_at_every_operation, str(tmp_path), mode)
    assert counts["died"] > 40
    assert counts["old"] > 20
    assert counts["new"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exchange", "name by name"])
def test_a_saver_may_be_killed_at_any_moment(tmp_path: Path, mode: str) -> None:
    counts = run_apart(killing.die_at_random_moments, str(tmp_path), mode, 60, 1)
    assert counts["died"] >= 60
    assert counts["old"] > 10
    assert counts["new"] > 0


def leave_litter(parent: Path, name: str, owner: Owner) -> Path:
    """What a save leaves that died while it wrote."""
    path = parent / f".{name}.saving"
    (path / "new").mkdir(parents=True)
    (path / "new" / "half.safetensors").write_bytes(b"half")
    (path / "owner").write_text(json.dumps({"owner": str(owner), "host": "elsewhere", "since": "then"}))
    return path


def test_the_next_save_sweeps_also_what_saves_elsewhere_beside_left(tmp_path: Path) -> None:
    dead = Owner.of_this_process()
    for name in ("ckpt", "step-1", "step-2"):
        leave_litter(tmp_path, name, dead)
    (tmp_path / f".step-3.saving-{dead}").mkdir()
    save_version(tmp_path / "ckpt", 1)
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_process_that_has_the_number_of_a_dead_one_is_another(tmp_path: Path) -> None:
    owner = Owner.of_this_process()
    leave_litter(tmp_path, "ckpt", Owner(owner.place, os.getppid(), owner.start + 1, "00"))
    save_version(tmp_path / "ckpt", 1)
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_process_that_nobody_has_waited_for_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    start = owner._start_of(child.pid)
    assert start
    leave_litter(tmp_path, "ckpt", Owner(Owner.of_this_process().place, child.pid, start, "00"))
    with pytest.raises(CheckpointError, match=rf"under way \(process {child.pid} on elsewhere since then\)"):
        save_version(tmp_path / "ckpt", 1)
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    save_version(tmp_path / "ckpt", 1)
    child.wait()
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_save_on_another_machine_is_dead_only_after_a_day_without_a_change(tmp_path: Path) -> None:
    path = leave_litter(tmp_path, "ckpt", Owner("0123456789ab", 1, 1, "00"))
    day_ago = time.time() - workspace.ABANDONED_AFTER - 60
    for old in (path, path / "owner", path / "new"):
        os.utime(old, (day_ago, day_ago))
    with pytest.raises(CheckpointError, match=r"if you know that it is dead, remove .*saving and save again"):
        save_version(tmp_path / "ckpt", 1)
    assert (path / "new" / "half.safetensors").exists(), "one file has changed today"
    os.utime(path / "new" / "half.safetensors", (day_ago, day_ago))
    save_version(tmp_path / "ckpt", 1)
    assert os.listdir(tmp_path) == ["ckpt"]


def test_sweeping_never_follows_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    (precious / "owner").write_text(json.dumps({"owner": str(Owner.of_this_process())}))
    parent = tmp_path / "parent"
    path = leave_litter(parent, "ckpt", Owner.of_this_process())
    (path / "new" / "directory").symlink_to(precious)
    (path / "new" / "file").symlink_to(precious / "thesis.tex")
    (parent / ".other.saving").symlink_to(precious)
    save_version(parent / "ckpt", 1)
    assert sorted(os.listdir(parent)) == [".other.saving", "ckpt"]
    assert (precious / "thesis.tex").read_text() == "years of work"


def test_sweeping_leaves_alone_what_belongs_to_another_user(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    path = leave_litter(tmp_path, "other", Owner.of_this_process())
    (path / "commit.json").write_text("whatever it says")
    os.chown(path, 12345, 12345)
    save_version(tmp_path / "ckpt", 1)
    assert (path / "commit.json").exists()


def test_sweeping_leaves_alone_what_is_not_a_workspace(tmp_path: Path) -> None:
    for name in (".game.saving", "x.saving", ".saving", ".ckpt.saving-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / ".file.saving").write_text("")
    before = files_in(tmp_path)
    save_version(tmp_path / "out", 1)
    assert [name for name in files_in(tmp_path) if not name.startswith("out/")] == before


def test_a_damaged_journal_is_not_obeyed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    victim = tmp_path / "victim"
    victim.write_text("stays")
    for number, text in enumerate(
        [
            "{",
            "[]",
            '{"inside": false, "name": "out", "fresh": ["../victim"], "replacing": [], "removed": {}}',
            '{"inside": false, "name": "..", "fresh": [], "replacing": [], "removed": {"../victim": [1]}}',
            '{"inside": false, "name": "a/b", "fresh": [], "replacing": [], "removed": {}}',
        ]
    ):
        (leave_litter(tmp_path, f"other{number}", Owner.of_this_process()) / "commit.json").write_text(text)
    save_version(tmp_path / "ckpt", 1)
    assert victim.read_text() == "stays"
    assert version_in(tmp_path / "ckpt") == 1
    assert caplog.text.count("not the journal of an interrupted save") == 5
    assert caplog.text.count("unsafe file name") == 2


def test_finishing_an_interrupted_save_spares_what_came_after(tmp_path: Path) -> None:
    ckpt = tmp_path / "ckpt"
    save_version(ckpt, 1)

    class Dying(NoExchange):
        def unlink(self, path: Any) -> None:
            if str(path).endswith(".safetensors"):
                raise OSError(errno.EIO, "Input/output error")
            super().unlink(path)

    with pytest.raises(OSError, match="the new checkpoint is complete, the next save into the directory"):
        save_version(ckpt, 2, storage=Dying())
    name = "model-00001-of-00003.safetensors"
    os.unlink(ckpt / name)
    (ckpt / name).write_text("put here by the user")
    save_version(tmp_path / "other", 1)
    assert (ckpt / name).read_text() == "put here by the user"
    assert not litter(tmp_path)


# Ranks over gloo ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 4])
def test_gloo_ranks_save_one_checkpoint(tmp_path: Path, gloo: Gloo, world_size: int) -> None:
    for version in (1, 2):
        gloo.run_ok(saving_ranks.save, str(tmp_path / "ckpt"), version, world_size=world_size)
        assert version_in(tmp_path / "ckpt") == version
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_fault_of_any_rank_in_any_phase_is_told_to_all_alike(tmp_path: Path, gloo: Gloo) -> None:
    save_version(tmp_path / "ckpt", 1)
    operations = ["create", "reserve", "write", "sync", "close"]
    told = gloo.run_ok(saving_ranks.save_repeatedly_with_faults, str(tmp_path), operations, world_size=3)
    assert told[0] == told[1] == told[2]
    assert [(operation, ranks) for operation, _, ranks in told[0]] == [
        (operation, [rank]) for operation in operations for rank in range(3)
    ]
    assert all("No space left on device while" in text for _, text, _ in told[0])
    assert version_in(tmp_path / "ckpt") == 1
    assert os.listdir(tmp_path) == ["ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_or_freezes_fails_the_others_in_time(
    tmp_path: Path, gloo: Gloo, rank: int, how: str
) -> None:
    save_version(tmp_path / "ckpt", 1)
    directory, timeout = str(tmp_path / "ckpt"), 4.0
    results = gloo.run(
        saving_ranks.one_goes_while_saving, directory, rank, how, timeout, world_size=3, lost=[rank]
    )
    assert isinstance(results.pop(rank), RankFailure)
    for text, failed, seconds in results:
        assert failed == [rank]
        assert f"rank {rank}" in text
        assert seconds < timeout + 2
    assert version_in(tmp_path / "ckpt") == 1
    save_version(tmp_path / "ckpt", 3)
    assert version_in(tmp_path / "ckpt") == 3
    assert os.listdir(tmp_path) == ["ckpt"]


# Full disks and directories that cannot be written ------------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small file system of its own, where that is permitted."""
    mounted: list[Path] = []

    def make(name: str, options: str) -> Path:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", path], capture_output=True)
        if done.returncode:
            pytest.skip(f"no mounting here: {done.stderr.decode().strip()}")
        mounted.append(path)
        return path

    yield make
    for path in reversed(mounted):
        subprocess.run(["umount", path], check=True)


def save_large(directory: Path, nbytes: int) -> None:
    import torch

    with transaction(directory) as save:
        fill(save, 2)
        save.write_tensors({"large": torch.zeros(nbytes, dtype=torch.uint8)})


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, mount: Callable[..., Path]) -> None:
    disk = mount("disk", "size=2m")
    save_version(disk / "ckpt", 1)
    used = os.statvfs(disk).f_bfree
    for _ in range(3):
        with pytest.raises(
            OSError, match=r"No space left on device while writing to .*nothing was published"
        ):
            save_large(disk / "ckpt", 3 << 20)
        assert version_in(disk / "ckpt") == 1
        assert os.listdir(disk) == ["ckpt"]
        assert os.statvfs(disk).f_bfree == used
    save_version(disk / "ckpt", 3)
    assert version_in(disk / "ckpt") == 3


def test_a_limit_on_file_sizes_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    assert run_apart(killing.save_beyond_a_limit, str(tmp_path)) == "File too large"
    assert version_in(tmp_path / "ckpt") == 1
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_disk_of_its_own_is_saved_to_from_inside(tmp_path: Path, mount: Callable[..., Path]) -> None:
    ckpt = mount("ckpt", "size=2m")
    for version in (1, 2, 3):
        save_version(ckpt, version)
        assert version_in(ckpt) == version
        assert not litter(ckpt)
        assert len(files_in(ckpt)) == 5
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_disk_below_the_directory_is_left_alone(tmp_path: Path, mount: Callable[..., Path]) -> None:
    ckpt = tmp_path / "ckpt"
    save_version(ckpt, 1)
    disk = mount("ckpt/disk", "size=1m")
    (disk / "data").write_text("far away")
    save_version(ckpt, 2)
    assert version_in(ckpt) == 2
    assert (disk / "data").read_text() == "far away"


def test_a_disk_below_that_would_be_superseded_is_left_alone_too(
    tmp_path: Path, mount: Callable[..., Path]
) -> None:
    ckpt = tmp_path / "ckpt"
    save_version(ckpt, 1)
    disk = mount("ckpt/disk", "size=1m")
    (disk / "data").write_text("far away")
    (ckpt / "empty").mkdir()
    with transaction(ckpt) as staged:
        fill(staged, 2)
        staged.supersede("*")
    assert version_in(ckpt) == 2
    assert not (ckpt / "empty").exists()
    assert (disk / "data").read_text() == "far away"


def test_a_read_only_disk_says_so(tmp_path: Path, mount: Callable[..., Path]) -> None:
    disk = mount("disk", "size=1m,ro")
    with pytest.raises(
        OSError, match=r"Read-only file system while preparing to save to .*nothing was published"
    ):
        save_version(disk / "ckpt", 1)


# Several at once ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exchange", "name by name"])
def test_a_reader_sees_only_whole_checkpoints_during_200_saves(tmp_path: Path, mode: str) -> None:
    counts = run_apart(killing.read_while_others_save, str(tmp_path), mode, 200)
    assert counts["reads"] > 100
    assert counts["versions"] > 20


@pytest.mark.parametrize("mode", ["exchange", "name by name"])
def test_of_two_savers_one_wins_and_none_corrupts(tmp_path: Path, mode: str) -> None:
    ckpt = tmp_path / "ckpt"
    save_version(ckpt, 0, durable=False)
    saved: list[int] = []
    refused: list[str] = []

    def work(thread: int) -> None:
        for version in range(thread, 120, 4):
            try:
                save_version(ckpt, version, storage=healthy(mode, ckpt))
                saved.append(version)
            except CheckpointError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert saved
    assert refused
    assert all("another save into" in text for text in refused)
    assert version_in(ckpt) == saved[-1]
    assert len(files_in(tmp_path)) == 5


def test_of_several_processes_one_wins_at_a_time(tmp_path: Path) -> None:
    counts = run_apart(killing.save_by_many, str(tmp_path), 3, 90)
    assert set(counts) <= {"saved", "refused"}
    assert counts["saved"] > 5
    assert not litter(tmp_path)


def test_saves_side_by_side_do_not_disturb_each_other(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        for version in range(15):
            if error := attempt(save_version, tmp_path / f"ckpt{thread}", version, durable=False):
                errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [version_in(tmp_path / f"ckpt{thread}") for thread in range(4)] == [14] * 4
    assert len(os.listdir(tmp_path)) == 4


def test_a_save_into_a_folder_of_a_checkpoint_survives_a_save_of_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ckpt = tmp_path / "ckpt"
    save_version(ckpt, 1)
    with transaction(ckpt / "adapters" / "one") as save:
        fill(save, 5)
        save_version(ckpt, 2)
    assert version_in(ckpt) == 2
    assert version_in(ckpt / "adapters" / "one") == 5
    assert "belongs to another save" in caplog.text


@pytest.mark.parametrize(("contiguous", "limit"), [(True, 4), (False, 20)])
def test_saving_takes_no_memory_to_speak_of(tmp_path: Path, contiguous: bool, limit: int) -> None:
    assert run_apart(killing.peak_of_saving, str(tmp_path), contiguous, 128 << 20) < limit << 20


def test_many_saves_leak_nothing(tmp_path: Path) -> None:
    def state() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    save_version(tmp_path / "ckpt", 0, durable=False)
    before, failed = state(), 0
    for version in range(50):
        save_version(tmp_path / "ckpt", version, durable=False)
        storage = FaultyStorage(1 + version % 30, NO_SPACE, durable=False)
        failed += attempt(save_version, tmp_path / "ckpt", 0, storage=storage) is not None
    assert failed > 40
    assert state() == before
    assert os.listdir(tmp_path) == ["ckpt"]
