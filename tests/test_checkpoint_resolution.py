"""Which checkpoint is loaded: what was named, the newest that counts, or a clear error. Never a guess."""

from __future__ import annotations

import json

import pytest
import torch
from support.iteration_dirs import hf_directory, run_directory, track

from patchers.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from sharded_ckpt.checkpoint.coordinator import Solo
from sharded_ckpt.training.checkpointing.config import CheckpointConfig
from sharded_ckpt.training.checkpointing.layout import (
    _DIRECT_ITERATION_DIR_SENTINEL,
    TRACKER_PREFIX,
    _get_checkpoint_format,
    find_checkpoint_rank_0,
    is_hf_directory,
    is_iteration_directory,
    iteration_name,
    iteration_of,
)
from sharded_ckpt.training.checkpointing.listing import list_checkpoints
from sharded_ckpt.training.checkpointing.local import _get_non_persistent_iteration
from sharded_ckpt.training.checkpointing.resolution import (
    _resolve_checkpoint_iteration,
    newest_of_all,
    resolve,
    resolve_together,
)
from sharded_ckpt.training.checkpointing.trackers import read_metadata, read_tracker


def resolved(**options):
    return resolve_together(CheckpointConfig(**options), Solo())


# Names and markers -----------------------------------------------------------------------------------------


def test_names_are_those_of_megatron_bridge():
    assert (iteration_name(10), iteration_name(12345678)) == ("iter_0000010", "iter_12345678")
    assert TRACKER_PREFIX == "latest"
    names = [
        "iter_0000010",
        "iter_12345678",
        "iter_010",
        "iter_00000010",
        "iter_0000010.bak",
        "iter_foo",
        "logs",
    ]
    assert [iteration_of(name) for name in names] == [10, 12345678, None, None, None, None, None]


@pytest.mark.parametrize(
    ("names", "is_step", "is_hf"),
    [
        (["run_config.yaml"], True, False),
        (["run_config.json"], True, False),
        (["train_state.pt"], True, False),
        (["train_state.json"], True, False),
        (["metadata.json"], True, False),
        ([".metadata"], True, False),
        (["training_state.json"], True, False),
        (["config.json", "model.safetensors"], False, True),
        (["config.json", "model.safetensors.index.json"], False, True),
        (["config.json", "pytorch_model.bin"], False, True),
        (["config.json", "model-00001-of-00002.safetensors"], False, True),
        (["config.json"], False, False),
        (["model.safetensors"], False, False),
        ([], False, False),
    ],
)
def test_directories_are_told_by_what_is_in_them(names, is_step, is_hf):
    assert (is_iteration_directory(names), is_hf_directory(names)) == (is_step, is_hf)


def test_the_format_of_a_checkpoint_is_what_its_marker_says(tmp_path):
    kinds = {
        "ours": {"metadata.json": json.dumps({"sharded_backend": "safetensors"})},
        "megatron": {"metadata.json": json.dumps({"sharded_backend": "torch_dist"})},
        "state": {"training_state.json": "{}"},
        "dcp": {".metadata": ""},
        "hf": {"config.json": "{}", "model.safetensors": ""},
    }
    for name, files in kinds.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(content)
    found = {name: _get_checkpoint_format(str(tmp_path / name)) for name in kinds}
    assert found == {
        "ours": "safetensors",
        "megatron": "torch_dist",
        "state": "safetensors",
        "dcp": "fsdp_dtensor",
        "hf": "hf",
    }
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of a known form: .*; found notes\.txt"):
        _get_checkpoint_format(str(tmp_path / "other"))


def test_the_directory_of_a_step_is_found_if_it_is_whole(tmp_path):
    run_directory(tmp_path, [10])
    (tmp_path / "iter_0000020").mkdir()
    assert find_checkpoint_rank_0(str(tmp_path), 10) == str(tmp_path / "iter_0000010")
    assert find_checkpoint_rank_0(str(tmp_path), 20) is None
    assert find_checkpoint_rank_0(str(tmp_path), 10, release=True) is None


# Trackers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"), [("20", (20, False)), ("20\n", (20, False)), ("release", (0, True))]
)
def test_megatrons_tracker_names_a_step_or_a_release(tmp_path, text, said):
    (tmp_path / "tracker").write_text(text)
    assert read_metadata(str(tmp_path / "tracker")) == said


@pytest.mark.parametrize("text", ["", "latest", "-3", "1.5", "٣", "20 30", "\0"])
def test_a_broken_tracker_is_an_error_and_never_taken_for_none(tmp_path, text):
    run_directory(tmp_path, [20], text)
    with pytest.raises(CheckpointError, match="expected a step, or the word release; found"):
        resolved(load=tmp_path, save=tmp_path)


@pytest.mark.parametrize("content", ['{"step": "20"}', '{"step": true}', '{"step": -1}', "[]", "{", ""])
def test_a_broken_train_state_is_an_error_even_if_the_text_tracker_is_good(tmp_path, content):
    run_directory(tmp_path, [20], 20)
    (tmp_path / "latest_train_state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"latest_train_state\.json: (expected a step|not valid JSON)"):
        resolved(load=tmp_path)


def test_our_tracker_goes_before_the_bridges_and_that_before_megatrons(tmp_path):
    run_directory(tmp_path, [10, 20, 30], 10)
    assert read_tracker(tmp_path).iteration == 10
    torch.save({"step": torch.tensor(20)}, tmp_path / "latest_train_state.pt")
    assert read_tracker(tmp_path).iteration == 20
    track(tmp_path, 30)
    assert read_tracker(tmp_path).iteration == 30


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle was run')",))


def test_what_is_pickled_in_a_bridge_tracker_is_not_run(tmp_path):
    torch.save({"step": Payload()}, tmp_path / "latest_train_state.pt")
    with pytest.raises(CheckpointError, match=r"latest_train_state\.pt: not read as plain tensors"):
        read_tracker(tmp_path)


# What is resolved ------------------------------------------------------------------------------------------


def test_the_newest_that_the_tracker_names_is_taken_not_the_largest_number(tmp_path):
    run_directory(tmp_path, [10, 20, 100], 20)
    found = resolved(load=tmp_path)
    assert (found.directory, found.iteration, found.origin) == (str(tmp_path / "iter_0000020"), 20, "tracker")
    assert found.older == (str(tmp_path / "iter_0000010"),)
    assert _resolve_checkpoint_iteration(str(tmp_path), None) == (20, False)


def test_a_second_save_in_the_same_process_is_seen(tmp_path):
    run_directory(tmp_path, [10, 20], 10)
    assert resolved(load=tmp_path).iteration == 10
    track(tmp_path, 20)
    assert resolved(load=tmp_path).iteration == 20


def test_an_explicit_step_is_taken_or_named_as_missing(tmp_path):
    run_directory(tmp_path, [10, 20], 20)
    assert resolved(load=tmp_path, ckpt_step=10).iteration == 10
    assert _resolve_checkpoint_iteration(str(tmp_path), 10) == (10, False)
    text = r"ckpt_step is 15, but .* has no checkpoint iter_0000015: there are checkpoints of steps 10,20"
    with pytest.raises(FileNotFoundError, match=text):
        resolved(load=tmp_path, ckpt_step=15)
    with pytest.raises(FileNotFoundError, match=text):
        _resolve_checkpoint_iteration(str(tmp_path), 15)


def test_an_explicit_step_needs_no_tracker(tmp_path):
    run_directory(tmp_path, [10, 20])
    (tmp_path / f"{TRACKER_PREFIX}_train_state.json").write_text('{"step": ')
    with pytest.raises(CheckpointError, match=r"not valid JSON.* or pass ckpt_step"):
        resolved(load=tmp_path)
    assert resolved(load=tmp_path, ckpt_step=10).iteration == 10
    assert _resolve_checkpoint_iteration(str(tmp_path), 10) == (10, False)


def test_the_directory_of_one_step_goes_before_an_explicit_step(tmp_path):
    run_directory(tmp_path, [10, 20], 20)
    direct = str(tmp_path / "iter_0000010")
    assert _resolve_checkpoint_iteration(direct, 20) == (_DIRECT_ITERATION_DIR_SENTINEL, False) == (-2, False)
    found = resolved(load=direct, ckpt_step=20)
    assert (found.directory, found.origin) == (direct, "direct")


def test_a_release_is_weights_at_step_zero(tmp_path):
    run_directory(tmp_path, [10], "release")
    with pytest.raises(
        CheckpointNotFoundError, match=r"names a release, but there is no .*release; there are"
    ):
        resolved(load=tmp_path)
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "metadata.json").write_text("{}")
    found = resolved(load=tmp_path)
    assert (found.directory, found.iteration, found.weights_only) == (str(tmp_path / "release"), 0, True)


def test_nothing_named_is_nothing_loaded():
    assert resolved() is None
    assert _resolve_checkpoint_iteration(None, None) == (-1, False)


@pytest.mark.parametrize("made", [False, True])
def test_a_training_that_resumes_itself_starts_fresh_once_and_any_other_must_find_something(tmp_path, made):
    run = tmp_path / "run"
    if made:
        run.mkdir()
        (run / "train.log").write_text("")
    assert resolved(load=run, save=run) is None
    found = "found train.log" if made else "there is no such directory"
    for options in ({"save": run, "exit_on_missing_checkpoint": True}, {}, {"save": tmp_path / "elsewhere"}):
        with pytest.raises(
            FileNotFoundError, match=f"load is .*run: .*{found}.* A training that is to start"
        ):
            resolved(load=run, **options)


def test_checkpoints_without_a_tracker_are_never_passed_over(tmp_path, caplog):
    run_directory(tmp_path, [10, 20])
    with pytest.raises(CheckpointNotFoundError, match=r"no tracker .* steps 10,20\. Name one with ckpt_step"):
        resolved(load=tmp_path, save=tmp_path)
    assert resolved(load=tmp_path, fall_back=True).iteration == 20
    assert "has no tracker; the newest checkpoint is taken, step 20" in caplog.text


def test_a_tracker_of_what_is_gone_is_an_error_unless_an_older_one_was_asked_for(tmp_path, caplog):
    run_directory(tmp_path, [10, 15, 40], 30)
    with pytest.raises(
        CheckpointNotFoundError, match=r"names step 30, but there is no .*iter_0000030; there are"
    ):
        resolved(load=tmp_path, save=tmp_path)
    found = resolved(load=tmp_path, fall_back=True)
    assert found.iteration == 15, "40 is of a future that the tracker does not know"
    assert "names step 30, whose checkpoint is gone: falling back to step 15" in caplog.text


def test_hugging_face_weights_are_no_training_to_resume_but_one_to_start_from(tmp_path):
    weights = hf_directory(tmp_path / "hf")
    with pytest.raises(
        ValueError, match=r"checkpoint of Hugging Face: it has no step.*name it as pretrained_check"
    ):
        resolved(load=weights)
    found = resolved(pretrained_checkpoint=weights)
    assert (found.directory, found.iteration, found.weights_only) == (str(weights), 0, True)


def test_a_run_goes_before_the_weights_that_it_started_from(tmp_path):
    weights = hf_directory(tmp_path / "hf")
    run = tmp_path / "run"
    options = {"load": run, "save": run, "pretrained_checkpoint": weights}
    assert resolved(**options).origin == "pretrained"
    run_directory(run, [10], 10)
    assert resolved(**options).origin == "tracker"


@pytest.mark.parametrize("kind", ["missing", "empty", "untracked"])
def test_wrong_pretrained_weights_never_mean_random_ones(tmp_path, kind):
    where = tmp_path / "weights"
    if kind != "missing":
        run_directory(where, [10] if kind == "untracked" else [])
    with pytest.raises(FileNotFoundError, match="training does not start from random weights"):
        resolved(pretrained_checkpoint=where)


def test_pretrained_weights_may_be_of_another_training(tmp_path):
    run_directory(tmp_path, [10, 20], 20)
    found = resolved(pretrained_checkpoint=tmp_path)
    assert (found.directory, found.weights_only) == (str(tmp_path / "iter_0000020"), True)
    assert resolved(pretrained_checkpoint=tmp_path / "iter_0000010").directory.endswith("iter_0000010")


def test_the_newest_of_persistent_and_short_lived_ones_wins(tmp_path, caplog):
    run_directory(tmp_path, [10, 20], 20)
    short = run_directory(tmp_path / "non_persistent", [15], 15)
    options = {"load": tmp_path, "save": tmp_path, "non_persistent_ckpt_type": "global"}
    assert resolved(**options).origin == "tracker"
    assert "non_persistent/iter_0000015 is left aside" in caplog.text
    run_directory(short, [25], 25)
    found = resolved(**options)
    assert (found.origin, found.directory) == ("non_persistent", str(short / "iter_0000025"))
    assert resolved(**options, ckpt_step=10).iteration == 10, "an explicit step is what it says"


def test_a_short_lived_one_is_found_before_the_first_persistent_save(tmp_path):
    run_directory(tmp_path / "run" / "non_persistent", [5], 5)
    found = resolved(load=tmp_path / "run", save=tmp_path / "run", non_persistent_ckpt_type="global")
    assert (found.origin, found.iteration) == ("non_persistent", 5)
    assert _get_non_persistent_iteration(str(tmp_path / "run" / "non_persistent"), "global") == 5
    with pytest.raises(ValueError, match="non_persistent_ckpt_type is 'ram'; it must be global or local"):
        _get_non_persistent_iteration("run", "ram")


def test_local_checkpoints_count_as_far_as_all_ranks_have_them(tmp_path):
    assert newest_of_all([[10, 20, 30], [20, 30], [10, 20]]) == 20
    config = CheckpointConfig(
        load=run_directory(tmp_path, [10], 10),
        non_persistent_ckpt_type="local",
        non_persistent_local_ckpt_dir="x",
    )
    listing = list_checkpoints(tmp_path)
    assert resolve(config, listing, local=20).origin == "local"
    assert resolve(config, listing, local=5).origin == "tracker"


def test_finetuning_takes_weights_alone(tmp_path):
    run_directory(tmp_path, [10], 10)
    assert resolved(load=tmp_path, finetune=True).weights_only
    assert not resolved(load=tmp_path).weights_only


# The config ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"save": ""}, "save is ''; it must be a path"),
        ({"load": 3}, "load is 3; it must be a path"),
        ({"ckpt_step": 3}, "ckpt_step says what to resume, but load is not set"),
        ({"load": "a", "ckpt_step": -1}, "ckpt_step is -1; it must be 0 or more"),
        ({"load": "a", "ckpt_step": 3, "fall_back": True}, "ckpt_step asks for one step, fall_back for any"),
        ({"fall_back": True}, "fall_back says how to resume, but load is not set"),
        ({"exit_on_missing_checkpoint": True}, "exit_on_missing_checkpoint says how to resume"),
        ({"ckpt_format": "torch"}, "ckpt_format is 'torch'; it must be safetensors"),
        ({"async_worker": "fork"}, "async_worker is 'fork'; it must be one of thread, process"),
        ({"dist_ckpt_strictness": "strict"}, "dist_ckpt_strictness is 'strict'; it must be one of assume_ok"),
        (
            {"non_persistent_ckpt_type": "ram"},
            "non_persistent_ckpt_type is 'ram'; it must be one of None, global",
        ),
        ({"save": "a", "save_interval": 0}, "save_interval is 0; it must be 1 or more"),
        ({"save_interval": 3}, "save_interval is set, but save is not: nothing would be saved"),
        ({"save_first_step": True}, "save_first_step is set, but save is not"),
        ({"async_save": True}, "async_save is set, but save is not"),
        ({"save": "a", "save_optim": 1}, "save_optim is 1; it must be True or False"),
        ({"most_recent_k": 0}, "most_recent_k is 0; it must be 1 or more, or -1 for all"),
        ({"most_recent_k": -2}, "most_recent_k is -2; it must be 1 or more, or -1 for all"),
        ({"non_persistent_recent_k": 0}, "non_persistent_recent_k is 0; it must be 1 or more"),
        ({"finetune": True}, "finetune needs weights"),
        ({"non_persistent_save_interval": 3}, "non_persistent_ckpt_type is not: set it to global or local"),
        ({"non_persistent_ckpt_type": "local"}, "local checkpoints need a place"),
        ({"non_persistent_ckpt_type": "global"}, "global short-lived checkpoints need a place"),
        ({"save": "a", "non_persistent_local_ckpt_dir": "b"}, "nothing would go there"),
        ({"save": "s3://bucket/run"}, "s3://bucket/run: expected a local path, found a URL"),
        ({"ckpt_format": "fsdp_dtensor"}, "torch DCP are written by save_fsdp_dtensor_checkpoint"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_when_it_is_made(options, text):
    with pytest.raises(ConfigError, match=text):
        CheckpointConfig(**options)


def test_paths_in_a_config_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = CheckpointConfig(save="~/run", load=tmp_path / "run")
    assert config.save == tmp_path / "run"
    assert config.resumes_itself


def test_a_save_is_due_at_intervals_at_the_end_and_after_the_first_step_if_asked():
    every_third = CheckpointConfig(save="run", save_interval=3)
    due = [every_third.due(1), every_third.due(2), every_third.due(2, last=True), every_third.due(3)]
    assert due == [None, None, "persistent", "persistent"]
    assert (every_third.due(4), every_third.due(4, last=True)) == (None, "persistent")
    first = CheckpointConfig(save="run", save_interval=10, save_first_step=True)
    assert [first.due(step) for step in (1, 2, 10)] == ["persistent", None, "persistent"]


def test_without_a_place_nothing_is_ever_due():
    config = CheckpointConfig(load="run")
    assert [config.due(1), config.due(10), config.due(10, last=True)] == [None] * 3


def test_short_lived_saves_are_due_between_the_others():
    config = CheckpointConfig(
        save="run", save_interval=6, non_persistent_ckpt_type="global", non_persistent_save_interval=2
    )
    due = [config.due(step) for step in range(1, 7)]
    assert due == [None, "non_persistent", None, "non_persistent", None, "persistent"]
