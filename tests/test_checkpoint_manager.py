"""Checkpoints of a training in one process: saved whole, resumed exactly, and wrong paths said clearly."""

from __future__ import annotations

import argparse
import errno
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.iteration_dirs import steps_in
from support.storages import FaultyStorage, WatchedStorage
from support.tiny import tiny_model
from support.trainings import Training, config_of, equal
from torch import nn
from transformers import AutoModelForCausalLM

from patchers.errors import CheckpointError, CheckpointNotFoundError, ConfigError, MissingKeysError
from sharded_ckpt.training.checkpointing import (
    AsyncCallsQueue,
    CheckpointConfig,
    CheckpointLoadContext,
    CheckpointManager,
    CheckpointSaveContext,
    CheckpointType,
    DefaultCheckpointManager,
    GlobalState,
    _build_sharded_state_dict_metadata,
    _extract_megatron_lm_args_from_state_dict,
    _generate_model_state_dict,
    _get_checkpoint_format,
    _is_model_section,
    _load_checkpoint_from_path,
    _load_model_state_dict,
    _load_model_weights_from_checkpoint,
    apply_peft_adapter_filter_to_state_dict,
    create_checkpoint_manager,
    delete_extra_state,
    generate_state_dict,
    get_checkpoint_version,
    get_rng_state,
    legacy,
    load_checkpoint,
    maybe_finalize_async_save,
    pin_checkpoint,
    save_checkpoint,
    set_checkpoint_version,
)

# The manager -----------------------------------------------------------------------------------------------


class OwnManager(DefaultCheckpointManager):
    """A manager of the user's own."""


class NoManager:
    """Has none of the methods."""

    def __init__(self, checkpoint_config):
        self.checkpoint_config = checkpoint_config


class OddManager(OwnManager):
    """Cannot be called as a manager is."""

    def save(self, ctx):
        raise AssertionError("never called")


def test_the_manager_is_the_default_one_or_the_one_that_is_named():
    config = CheckpointConfig(save="run")
    assert type(create_checkpoint_manager(config)) is DefaultCheckpointManager
    assert isinstance(create_checkpoint_manager(config), CheckpointManager)
    assert not isinstance(NoManager(config), CheckpointManager)
    path = "sharded_ckpt.training.checkpointing.manager.DefaultCheckpointManager"
    assert (
        type(create_checkpoint_manager(CheckpointConfig(custom_manager_class=path)))
        is DefaultCheckpointManager
    )
    own = create_checkpoint_manager(CheckpointConfig(custom_manager_class=OwnManager))
    assert type(own) is OwnManager
    assert own.checkpoint_config.custom_manager_class is OwnManager


@pytest.mark.parametrize(
    ("named", "kind", "text"),
    [
        (
            "Manager",
            ValueError,
            "Invalid custom_manager_class format: 'Manager'; expected package.module.Class",
        ),
        ("a..b", ValueError, "Invalid custom_manager_class format"),
        (
            "no_such_module.Manager",
            ImportError,
            "Could not import module no_such_module of custom_manager_class",
        ),
        ("json.Manager", AttributeError, "Module json does not have class Manager"),
        (
            "json.JSONDecoder",
            TypeError,
            "is no CheckpointManager: it has no save, load, finalize_async_saves",
        ),
        ("json.dumps", TypeError, "json.dumps is no class, but a function"),
        (NoManager, TypeError, "NoManager is no CheckpointManager: it has no save, load"),
        (OddManager, TypeError, "OddManager: save cannot be called as CheckpointManager.save is"),
    ],
)
def test_a_manager_that_cannot_be_had_is_one_of_four_errors(named, kind, text):
    with pytest.raises(kind, match=text):
        create_checkpoint_manager(CheckpointConfig(custom_manager_class=named))


def test_contexts_ask_for_what_is_needed_and_have_defaults_for_the_rest():
    state = GlobalState(CheckpointConfig())
    save = CheckpointSaveContext(state, [], None, None, 0)
    assert (save.train_data_iterator, save.non_persistent_ckpt) == (None, False)
    assert (save.pg_collection, save.module_name) == (None, None)
    load = CheckpointLoadContext(state, [], None, None)
    assert (load.strict, load.skip_load_to_model_and_opt) == (True, False)
    assert (load.pg_collection, load.module_name) == (None, None)
    with pytest.raises(TypeError):
        CheckpointSaveContext(state, [], None, None)
    assert {kind.name for kind in CheckpointType} == {"LOCAL", "GLOBAL", "FSDP_DTENSOR"}


class Told:
    def __init__(self):
        self.paths = []

    def on_checkpoint_save(self, checkpoint_path, state):
        tracker = Path(checkpoint_path).parent / "latest_train_state.json"
        self.paths.append((checkpoint_path, json.loads(tracker.read_text())["step"]))


def test_the_manager_hands_everything_on(tmp_path):
    config = config_of(tmp_path, non_persistent_ckpt_type="global")
    manager, told = create_checkpoint_manager(config), Told()
    training = Training(config).train(3)
    manager.save(
        CheckpointSaveContext(*training.parts, 300, non_persistent_ckpt=True, module_name="text"), told
    )
    directory = tmp_path / "non_persistent" / "iter_0000003"
    assert told.paths == [(str(directory), 3)]
    assert os.listdir(directory / "rng") == ["text.rank_00000.json"]
    other = Training(config, seed=1)
    assert manager.load(CheckpointLoadContext(*other.parts, module_name="text")) == (3, 300)
    assert equal(other.everything(), training.everything())
    with pytest.raises(CheckpointNotFoundError, match=r"rng/rank_00000\.json: no such file"):
        manager.load(CheckpointLoadContext(*other.parts))
    manager.finalize_async_saves(training.state, blocking=True, terminate=True)
    assert manager.checkpointing_context == {}


# Saved and resumed -----------------------------------------------------------------------------------------


def test_a_checkpoint_has_these_files(tmp_path):
    Training(config_of(tmp_path)).train(10).save()
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "iter_0000010/metadata.json",
        "iter_0000010/model/model-00001-of-00001.safetensors",
        "iter_0000010/model/model.safetensors.index.json",
        "iter_0000010/optim/optim-00001-of-00001.safetensors",
        "iter_0000010/optim/optim.safetensors.index.json",
        "iter_0000010/optim/optimizer.json",
        "iter_0000010/rng/rank_00000.json",
        "iter_0000010/run_config.json",
        "iter_0000010/train_state.json",
        "iter_0000010/training_state.json",
        "latest_checkpointed_iteration.txt",
        "latest_train_state.json",
    ]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "10"
    assert (tmp_path / "latest_train_state.json").read_bytes() == (
        tmp_path / "iter_0000010/train_state.json"
    ).read_bytes()
    assert _get_checkpoint_format(str(tmp_path / "iter_0000010")) == "safetensors"


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    torch.manual_seed(3)
    training = Training(config_of(tmp_path)).train(3).save().train(4)
    torch.manual_seed(8)
    resumed = Training(config_of(tmp_path), seed=1)
    assert resumed.load() == (3, 300)
    assert resumed.state.train_state.floating_point_operations_so_far == 300
    resumed.train(4)
    assert resumed.losses == training.losses[3:]
    resumed.state.train_state.floating_point_operations_so_far = (
        training.state.train_state.floating_point_operations_so_far
    )
    assert equal(resumed.everything(), training.everything())


def test_a_training_begins_where_nothing_has_been_saved_yet(tmp_path):
    training = Training(config_of(tmp_path / "run"))
    before = training.everything()
    assert training.load() == (0, 0)
    assert equal(training.everything(), before)


def test_what_is_not_saved_is_not_loaded_and_what_is_fresh_stays_fresh(tmp_path, caplog):
    config = config_of(tmp_path, save_optim=False, save_rng=False)
    Training(config).train(2).save()
    assert not (tmp_path / "iter_0000002" / "rng").exists()
    resumed = Training(config, seed=1)
    before = resumed.everything()
    assert resumed.load() == (2, 200)
    after = resumed.everything()
    assert all(equal(after[name], before[name]) for name in ("optimizer", "scheduler", "random numbers"))
    assert not equal(after["model"], before["model"])
    assert "was saved without optimizer state: they stay as they are" in caplog.text
    for option, text in (("load_optim", "optimizer state"), ("load_rng", "random number generators")):
        wants = config_of(tmp_path, **{"load_optim": False, "load_rng": False, option: True})
        with pytest.raises(CheckpointError, match=f"saved without {text}: .*pass {option}=False"):
            Training(wants).load()
    assert Training(config_of(tmp_path, load_optim=False, load_rng=False)).load() == (2, 200)


def test_optimizer_and_random_numbers_can_be_left_out_of_a_load(tmp_path):
    Training(config_of(tmp_path)).train(2).save()
    resumed = Training(config_of(tmp_path, load_optim=False, load_rng=False), seed=1)
    before = resumed.everything()
    assert resumed.load() == (2, 200)
    after = resumed.everything()
    assert all(equal(after[name], before[name]) for name in ("optimizer", "scheduler", "random numbers"))


def test_finetuning_and_pretrained_weights_begin_at_step_zero(tmp_path):
    training = Training(config_of(tmp_path)).train(2).save()
    for options in (
        {"load": tmp_path, "finetune": True},
        {"pretrained_checkpoint": tmp_path},
        {"pretrained_checkpoint": tmp_path / "iter_0000002"},
        {"save": tmp_path / "new", "load": tmp_path / "new", "pretrained_checkpoint": tmp_path},
    ):
        tuned = Training(CheckpointConfig(**options), seed=1)
        before = tuned.everything()
        assert tuned.load() == (0, 0)
        after = tuned.everything()
        assert equal(after["model"], training.everything()["model"])
        assert all(equal(after[name], before[name]) for name in ("optimizer", "random numbers", "progress"))


def test_a_checkpoint_of_hugging_face_gives_weights_to_start_from_and_nothing_to_resume(tmp_path):
    saved = tiny_model(layers=2)
    saved.save_pretrained(tmp_path / "hf")
    model = tiny_model(layers=2, seed=1)
    with pytest.raises(ValueError, match="name it as pretrained_checkpoint"):
        Training(CheckpointConfig(load=tmp_path / "hf")).load()
    state = GlobalState(CheckpointConfig(pretrained_checkpoint=tmp_path / "hf"))
    manager = create_checkpoint_manager(state.checkpoint_config)
    assert manager.load(CheckpointLoadContext(state, [model], None, None)) == (0, 0)
    assert equal(dict(model.state_dict()), dict(saved.state_dict()))


def test_only_the_progress_is_taken_on_request(tmp_path):
    Training(config_of(tmp_path)).train(2).save()
    resumed = Training(config_of(tmp_path), seed=1)
    before = resumed.everything()
    assert resumed.load(skip_load_to_model_and_opt=True) == (2, 200)
    assert equal(resumed.everything()["model"], before["model"])
    assert resumed.step == 2


def test_a_load_that_fails_leaves_everything_as_it_was(tmp_path):
    Training(config_of(tmp_path)).train(2).save()
    for file, text in (
        ("rng/rank_00000.json", "not the state of random number generators"),
        ("train_state.json", "not the state of a training"),
        ("optim/optimizer.json", "not the state of an optimizer"),
    ):
        kept = (tmp_path / "iter_0000002" / file).read_bytes()
        (tmp_path / "iter_0000002" / file).write_text("{}")
        resumed = Training(config_of(tmp_path), seed=1)
        before = resumed.everything()
        with pytest.raises(CheckpointError, match=text):
            resumed.load()
        assert equal(resumed.everything(), before)
        (tmp_path / "iter_0000002" / file).write_bytes(kept)
    assert Training(config_of(tmp_path)).load() == (2, 200)


def test_strict_raises_for_every_name_that_one_side_lacks_and_otherwise_says_it(tmp_path, caplog):
    Training(config_of(tmp_path, save_optim=False)).train(1).save()
    other = Training(config_of(tmp_path, load_optim=False))
    other.model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(CheckpointError, match="none of its 2 tensors is one of the model"):
        other.load()
    bigger = Training(config_of(tmp_path, load_optim=False))
    bigger.model.register_parameter("scale", nn.Parameter(torch.ones(3)))
    with pytest.raises(MissingKeysError, match="the checkpoint lacks: scale"):
        bigger.load()
    assert bigger.load(strict=False) == (1, 100)
    assert "the checkpoint lacks: scale" in caplog.text
    smaller = Training(config_of(tmp_path, load_optim=False))
    smaller.model = nn.Linear(4, 3, bias=False)
    with pytest.raises(CheckpointError, match="the checkpoint has, and no rank wants: bias"):
        smaller.load()


def test_a_step_saved_again_is_the_later_one_alone(tmp_path):
    training = Training(config_of(tmp_path)).train(2).save()
    (tmp_path / "iter_0000002" / "rng" / "rank_00007.json").write_text("of a rank that is no more")
    training.model.weight.data.add_(1)
    training.save()
    assert os.listdir(tmp_path / "iter_0000002" / "rng") == ["rank_00000.json"]
    resumed = Training(config_of(tmp_path))
    resumed.load()
    assert equal(resumed.everything()["model"], training.everything()["model"])


def test_a_pinned_checkpoint_is_neither_removed_nor_replaced(tmp_path):
    training = Training(config_of(tmp_path, most_recent_k=1)).train(1).save()
    pin_checkpoint(tmp_path / "iter_0000001")
    with pytest.raises(CheckpointError, match="iter_0000001 is pinned, and not replaced"):
        training.save()
    training.train(1).save().train(1).save()
    assert steps_in(tmp_path) == [1, 3]


def test_a_run_that_went_back_leaves_the_future_that_it_gave_up(tmp_path):
    config = config_of(tmp_path, most_recent_k=2)
    training = Training(config)
    for _ in range(4):
        training.train(1).save()
    assert steps_in(tmp_path) == [3, 4]
    back = Training(config_of(tmp_path, most_recent_k=2, ckpt_step=3))
    assert back.load() == (3, 300)
    Training(config_of(tmp_path, most_recent_k=1)).train(2).save()
    assert steps_in(tmp_path) == [2, 3, 4], "3 and 4 are of another future, and 2 is what counts"
    assert Training(config_of(tmp_path)).load() == (2, 200)


@pytest.mark.parametrize("damage", ["truncated", "gone", "other save", "random numbers"])
def test_a_broken_newest_one_falls_back_only_when_asked_and_says_so(tmp_path, caplog, damage):
    training = Training(config_of(tmp_path)).train(1).save().train(1).save()
    shard = tmp_path / "iter_0000002" / "model" / "model-00001-of-00001.safetensors"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-4])
    elif damage == "gone":
        shard.unlink()
    elif damage == "random numbers":
        (tmp_path / "iter_0000002" / "rng" / "rank_00000.json").write_text("[]")
    else:
        (tmp_path / "iter_0000002" / "training_state.json").write_bytes(
            (tmp_path / "iter_0000001" / "training_state.json").read_bytes()
        )
    with pytest.raises(CheckpointError, match="An older checkpoint is taken with fall_back=True"):
        Training(config_of(tmp_path)).load()
    resumed = Training(config_of(tmp_path, fall_back=True))
    assert resumed.load() == (1, 100)
    assert "iter_0000002 cannot be read, falling back to an older checkpoint" in caplog.text
    assert training.step == 2


def test_what_is_not_ours_or_too_new_is_not_resumed(tmp_path):
    Training(config_of(tmp_path)).train(1).save()
    path = tmp_path / "iter_0000001" / "metadata.json"
    said = json.loads(path.read_text())
    for change, text in (
        ({"version": 2}, r"version 2, but only up to 1 is known here: update"),
        ({"format": "megatron", "sharded_backend": "torch_dist"}, "It seems to be Megatron's. Weights alone"),
        ({"world_size": None}, "has no usable world_size"),
    ):
        path.write_text(json.dumps({**said, **change}))
        with pytest.raises(CheckpointError, match=text):
            Training(config_of(tmp_path)).load()
    path.unlink()
    with pytest.raises(
        CheckpointNotFoundError, match=r"no metadata\.json, so nothing that a training can go on from"
    ):
        Training(config_of(tmp_path)).load()


def test_a_path_that_is_named_in_the_call_must_hold_a_checkpoint(tmp_path):
    Training(config_of(tmp_path / "a")).train(1).save()
    Training(config_of(tmp_path / "b")).train(2).save()
    training = Training(config_of(tmp_path / "a", ckpt_step=1), seed=1)
    with pytest.raises(CheckpointNotFoundError, match="ckpt_step is 1, but"):
        _load_checkpoint_from_path(str(tmp_path / "b"), *training.parts)
    assert _load_checkpoint_from_path(str(tmp_path / "b"), *training.parts, ignore_ckpt_step=True) == (2, 200)
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        _load_checkpoint_from_path(str(tmp_path / "c"), *training.parts, ignore_ckpt_step=True)


class Loader:
    """Counts."""

    def __init__(self):
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_the_place_in_the_data_and_the_tokenizer_are_part_of_a_checkpoint(tmp_path, caplog):
    class Tokenizer:
        def save_pretrained(self, directory):
            (Path(directory) / "tokenizer.json").write_text("{}")

    loader = Loader()
    loader.at = 7
    Training(config_of(tmp_path), tokenizer=Tokenizer()).train(2).save(train_data_iterator=loader)
    assert os.listdir(tmp_path / "iter_0000002" / "tokenizer") == ["tokenizer.json"]
    fresh = Loader()
    Training(config_of(tmp_path)).load(train_data_iterator=fresh)
    assert fresh.at == 7
    bare = config_of(tmp_path / "bare", save_tokenizer_assets=False)
    Training(bare, tokenizer=Tokenizer()).train(1).save()
    assert not (tmp_path / "bare" / "iter_0000001" / "tokenizer").exists()
    Training(bare).load(train_data_iterator=fresh)
    assert "was saved without a data loader: the data begins anew" in caplog.text


def test_the_model_is_there_for_the_loaders_of_hugging_face_too(tmp_path):
    model = tiny_model(layers=2)
    config = config_of(tmp_path, also_save_hf_checkpoint=True, save_rng=False)
    state = GlobalState(config)
    state.train_state.step = 1
    save_checkpoint(state, model, None, None, 0)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "iter_0000001" / "hf")
    assert equal(dict(opened.state_dict()), dict(model.state_dict()))
    with pytest.raises(ConfigError, match="also_save_hf_checkpoint needs the model"):
        save_checkpoint(state, [], None, None, 0, prebuilt_state_dict={"model": {}})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own call
def test_an_adapter_is_saved_alone_and_resumed_over_its_base(tmp_path):
    import peft

    base = tiny_model(layers=2)
    base.save_pretrained(tmp_path / "base")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"])

    def adapted(config, seed):
        state = GlobalState(config, peft_config=adapter)
        model = peft.get_peft_model(tiny_model(layers=2, seed=seed), adapter)
        trained = [p for p in model.parameters() if p.requires_grad]
        return state, model, torch.optim.AdamW(trained, lr=0.1), None

    config = config_of(tmp_path / "run", pretrained_checkpoint=tmp_path / "base")
    first = adapted(config, seed=3)
    assert load_checkpoint(*first) == (0, 0)
    ids = torch.arange(3, 11).view(1, 8)
    first[1](ids, labels=ids).loss.backward()
    first[2].step()
    first[0].train_state.step = 1
    save_checkpoint(*first, 10)
    shard = tmp_path / "run/iter_0000001/model/model-00001-of-00001.safetensors"
    assert all("lora_" in name for name in load_file(shard))
    resumed = adapted(config, seed=4)
    assert load_checkpoint(*resumed) == (1, 10)
    assert equal(dict(resumed[1].state_dict()), dict(first[1].state_dict()))
    plain = GlobalState(config_of(tmp_path / "run", load_optim=False))
    with pytest.raises(CheckpointError, match="holds an adapter alone, and a whole model is to be resumed"):
        load_checkpoint(plain, base, None, None)


# Short-lived ones ------------------------------------------------------------------------------------------


def test_a_short_lived_checkpoint_has_a_place_of_its_own_and_few_of_them_stay(tmp_path):
    config = config_of(tmp_path, non_persistent_ckpt_type="global")
    training = Training(config).train(1).save()
    for _ in range(4):
        training.train(1).save(non_persistent_ckpt=True)
    assert (steps_in(tmp_path), steps_in(tmp_path / "non_persistent")) == ([1], [4, 5])
    assert Training(config, seed=1).load() == (5, 500)
    with pytest.raises(ValueError, match="non_persistent_ckpt_type is None, so there is no place"):
        Training(config_of(tmp_path)).train(1).save(non_persistent_ckpt=True)


def test_a_local_checkpoint_is_resumed_and_few_of_them_stay(tmp_path):
    local = {"non_persistent_ckpt_type": "local", "non_persistent_local_ckpt_dir": tmp_path / "disk"}
    config = config_of(tmp_path / "run", **local)
    manager = create_checkpoint_manager(config)
    training = Training(config)
    for _ in range(3):
        training.train(1)
        manager.save(CheckpointSaveContext(*training.parts, 7, non_persistent_ckpt=True))
    assert steps_in(tmp_path / "disk" / "rank_00000") == [2, 3]
    assert not (tmp_path / "run").exists()
    resumed = Training(config, seed=1)
    assert manager.load(CheckpointLoadContext(*resumed.parts)) == (3, 7)
    assert equal(resumed.everything(), training.everything())


# What fails while it is saved ------------------------------------------------------------------------------


@pytest.mark.slow
def test_whatever_operation_fails_the_step_before_or_this_one_counts_whole(tmp_path):
    healthy = WatchedStorage(durable=True)
    Training(config_of(tmp_path / "healthy", most_recent_k=1)).train(1).save().train(1).save(storage=healthy)
    error = OSError(errno.ENOSPC, "No space left on device")
    failed, counts = 0, {1: 0, 2: 0}
    for number in range(1, len(healthy.log) + 1):
        config = config_of(tmp_path / str(number), most_recent_k=1)
        training = Training(config).train(1).save()
        before = training.everything()
        training.train(1)
        with suppress(OSError):
            training.save(storage=FaultyStorage(number, error))
            failed -= 1
        failed += 1
        resumed = Training(config, seed=1)
        step, _ = resumed.load()
        counts[step] += 1
        if step == 1:
            after = resumed.everything()
            assert equal(after["model"], before["model"])
        training.save()
        assert Training(config).load()[0] == 2
        left = [name for name in os.listdir(tmp_path / str(number)) if name.startswith(".")]
        assert not left, f"operation {number}, {healthy.log[number - 1]}: {left}"
    assert failed > 30
    assert counts[1] > 30
    assert counts[2] > 0


def test_a_failing_callback_is_raised_after_the_checkpoint_counts(tmp_path):
    class Failing:
        def on_checkpoint_save(self, checkpoint_path, state):
            raise RuntimeError("the tracking server is down")

    with pytest.raises(RuntimeError, match="the tracking server is down"):
        Training(config_of(tmp_path)).train(1).save(callback_manager=Failing())
    assert Training(config_of(tmp_path)).load() == (1, 100)


def test_there_must_be_a_place_to_save_to(tmp_path):
    with pytest.raises(ConfigError, match="there is no place to save to: set save"):
        Training(CheckpointConfig()).train(1).save()
    with pytest.raises(ConfigError, match="pg_collection is a int; pass the process group of the ranks"):
        Training(config_of(tmp_path)).train(1).save(pg_collection=3)


def test_a_save_in_the_background_goes_where_it_was_to_go_wherever_the_program_works_by_then(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    training = Training(config_of(Path("run"), async_save=True)).train(1).save()
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    maybe_finalize_async_save(training.state, training.state.checkpoint_config, blocking=True, terminate=True)
    assert steps_in(tmp_path / "run") == [1]
    assert Training(config_of(tmp_path / "run"), seed=1).load() == (1, 100)
    assert list(Path("run").iterdir()) == []


def test_a_save_in_the_background_counts_once_it_is_finalized(tmp_path):
    config = config_of(tmp_path, async_save=True, most_recent_k=1)
    manager, training, told = create_checkpoint_manager(config), Training(config), Told()
    for _ in range(2):
        training.train(1)
        manager.save(CheckpointSaveContext(*training.parts, 5), told)
        kept = training.everything()
        training.model.weight.data.add_(1)
    assert [step for _, step in told.paths] == [1], "the second one is not published yet"
    manager.finalize_async_saves(training.state, blocking=True, terminate=True)
    assert [step for _, step in told.paths] == [1, 2]
    assert steps_in(tmp_path) == [2]
    resumed = Training(config_of(tmp_path), seed=1)
    assert resumed.load() == (2, 5)
    assert equal(resumed.everything()["model"], kept["model"]), "as it was when the save began"
    wants = config_of(tmp_path, async_save=True, async_worker="process")
    with (
        AsyncCallsQueue() as queue,
        pytest.raises(ConfigError, match="async_worker is 'process', but"),
    ):
        Training(wants, async_calls_queue=queue).train(1).save()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_every_file_has_the_mode_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        Training(config_of(tmp_path / "run")).train(1).save()
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


# State dicts -----------------------------------------------------------------------------------------------


def test_extra_states_are_removed_from_the_model_and_from_nothing_else():
    assert delete_extra_state({"model": {"a": 1, "a._extra_state": 2}, "x._extra_state": 3}) == {
        "model": {"a": 1},
        "x._extra_state": 3,
    }
    flat = {"a": 1, "b._extra_state": 2}
    assert delete_extra_state(flat) is flat
    assert flat == {"a": 1}
    assert delete_extra_state([1]) == [1]


def test_sections_of_models_are_told_by_their_names():
    keys = ["model", "model0", "model12", "model_1", "models", "optimizer", "iteration", "xmodel", "model1a"]
    assert [key for key in keys if _is_model_section(key)] == ["model", "model0", "model12"]


class Owner:
    def adapter_key_filter(self, name):
        return ".adapter." in name


@pytest.mark.parametrize("said", [Owner(), lambda name: ".adapter." in name])
def test_only_adapters_stay_in_the_sections_of_models(said):
    model = {"a.weight": 1, "a.adapter.weight": 2, "a.adapter._extra_state": 3}
    state = {"model": model, "model1": {"b": 1}, "optimizer": {"a.weight": 1}, "iteration": 3}
    assert apply_peft_adapter_filter_to_state_dict(state, said) == {
        "model": {"a.adapter.weight": 2},
        "model1": {},
        "optimizer": {"a.weight": 1},
        "iteration": 3,
    }
    assert model.keys() == {"a.weight", "a.adapter.weight", "a.adapter._extra_state"}


def test_a_config_of_peft_says_what_an_adapter_is():
    import peft

    names = ["q.lora_A.default.weight", "q.base_layer.weight", "q.base_layer.bias", "head.modules_to_save.w"]
    state = {"model": dict.fromkeys(names, 1)}
    kept = apply_peft_adapter_filter_to_state_dict(state, peft.LoraConfig())
    assert list(kept["model"]) == [names[0], names[3]]
    kept = apply_peft_adapter_filter_to_state_dict(state, peft.LoraConfig(bias="all"))
    assert list(kept["model"]) == [names[0], names[2], names[3]]
    with pytest.raises(ConfigError, match="cannot be told from names alone"):
        apply_peft_adapter_filter_to_state_dict(state, peft.LoraConfig(bias="lora_only"))
    with pytest.raises(ConfigError, match="a int does not say which names belong to an adapter"):
        apply_peft_adapter_filter_to_state_dict(state, 3)


def test_a_state_dict_has_megatrons_sections_as_far_as_they_are_wanted(tmp_path):
    training = Training(config_of(tmp_path)).train(1)
    rng = get_rng_state()
    whole = generate_state_dict(*_args(training, config_of(tmp_path)), rng, 1, rerun_state={"mode": 1})
    assert whole["checkpoint_version"] == 3.0
    assert whole["iteration"] == 1
    assert set(whole) == {
        *("checkpoint_version", "iteration", "model", "optimizer", "opt_param_scheduler"),
        *("rerun_state_machine", "rng_state"),
    }
    assert whole["model"]["weight"].data_ptr() == training.model.weight.data_ptr()
    assert "state.weight.exp_avg" in whole["optimizer"]
    little = generate_state_dict(*_args(training, config_of(tmp_path, save_optim=False, save_rng=False)), rng)
    assert set(little) == {"checkpoint_version", "model"}
    assert set(_generate_model_state_dict([training.model])) == {"model"}
    assert _build_sharded_state_dict_metadata(True, config_of(tmp_path))["singleton_local_shards"] is False


def _args(training, config):
    return config, [training.model], training.optimizer, training.scheduler


def test_a_state_dict_that_was_made_before_is_saved_in_place_of_the_model(tmp_path):
    training = Training(config_of(tmp_path)).train(2)
    state = generate_state_dict(*_args(training, config_of(tmp_path)), get_rng_state(), 2)
    state = {**state, "model": {name: tensor.clone() for name, tensor in state["model"].items()}}
    expected = training.everything()
    save_checkpoint(training.state, [], None, None, 200, prebuilt_state_dict=state)
    resumed = Training(config_of(tmp_path), seed=1)
    assert resumed.load() == (2, 200)
    after = resumed.everything()
    assert all(equal(after[name], expected[name]) for name in ("model", "optimizer", "scheduler"))
    with pytest.raises(ConfigError, match=r"prebuilt_state_dict is of step 2, state\.train_state of step 3"):
        save_checkpoint(training.train(1).state, [], None, None, 0, prebuilt_state_dict=state)


def test_a_model_is_filled_strictly_but_for_extra_states():
    model = nn.Linear(2, 2)
    state = {**{n: t + 1 for n, t in model.state_dict().items()}, "x._extra_state": torch.ones(1)}
    assert _load_model_state_dict(model, state, True).filled == 2
    with pytest.raises(MissingKeysError, match="lacks: bias"):
        _load_model_state_dict(model, {"weight": state["weight"]}, True)
    assert _load_model_state_dict(model, {"weight": state["weight"]}, False).missing == ("bias",)


def test_weights_alone_are_read_of_any_directory_of_a_training(tmp_path):
    training = Training(config_of(tmp_path)).train(2).save()
    for path in (tmp_path, tmp_path / "iter_0000002"):
        model = nn.Linear(4, 3)
        assert _load_model_weights_from_checkpoint(str(path), [model]) is None
        assert equal(dict(model.state_dict()), training.everything()["model"])
    untouched = nn.Linear(4, 3, bias=False)
    before = untouched.weight.clone()
    read, missing, unexpected = _load_model_weights_from_checkpoint(
        str(tmp_path), [untouched], return_state_dict=True, dist_ckpt_strictness="return_all"
    )
    assert torch.equal(untouched.weight, before)
    assert torch.equal(read["weight"], training.model.weight)
    assert (missing, unexpected) == (set(), {"bias"})


# What Megatron-LM left -------------------------------------------------------------------------------------


def test_versions_are_set_once(monkeypatch):
    monkeypatch.setattr(legacy, "_CHECKPOINT_VERSION", None)
    assert get_checkpoint_version() is None
    set_checkpoint_version(3.0)
    set_checkpoint_version(3.0)
    with pytest.raises(
        ValueError, match=r"checkpoint versions do not match: this process has loaded version 3\.0"
    ):
        set_checkpoint_version(2.0)
    assert get_checkpoint_version() == 3.0


def test_arguments_of_megatron_lm_are_told_in_the_words_of_the_bridge():
    args = argparse.Namespace(tensor_model_parallel_size=4, no_save_optim=True, ckpt_fully_parallel_save=True)
    said = _extract_megatron_lm_args_from_state_dict({"args": args})
    assert said["model"]["tensor_model_parallel_size"] == 4
    assert said["model"]["pipeline_model_parallel_size"] == 1
    assert said["checkpoint"] == {"save_optim": False, "save_rng": True, "fully_parallel_save": True}
    with pytest.raises(RuntimeError, match="expected its arguments under 'args', found iteration"):
        _extract_megatron_lm_args_from_state_dict({"iteration": 3})
