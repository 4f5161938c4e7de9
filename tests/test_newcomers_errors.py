"""Every error that a newcomer meets says what to do, in Python and on the command line."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from support.fake_hub import use_hub
from support.hollow import LLAMA, hollow_checkpoint, llama_shapes, pruned_checkpoint

from patchers.errors import ConfigError, OwnershipError, PartialModelError
from sharded_ckpt import PipelineStage, default_runtime, load_and_shard_model, plan_ownership
from sharded_ckpt.cli import main
from sharded_ckpt.demo.tiny import tiny_folder
from sharded_ckpt.errors import CheckpointError, CheckpointNotFoundError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
READING = (
    ["inspect"],
    ["verify"],
    ["plan", "--ranks", "2"],
    ["infer-config"],
    ["diff", "model"],
    ["convert", "--shards", "2", "copy"],
)
"""Each command that reads a checkpoint; it comes first, or second in `diff`."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a checkpoint "model"."""
    pruned_checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that fails as it should: exit code 1, one line, no traceback; return the line."""
    assert main(argv) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"sharded-ckpt {argv[0]}: ")
    assert said.err.count("\n") == 1
    return said.err.partition(": ")[2].rstrip("\n")


def naming(command: list[str], checkpoint: str) -> list[str]:
    """Put a checkpoint into a command."""
    if command[0] == "diff":
        return [*command, checkpoint]
    return [command[0], checkpoint, *command[1:]]


def everywhere(
    capsys: pytest.CaptureFixture[str], checkpoint: str, error: type[Exception], text: str
) -> None:
    """Meet an error in all commands that read a checkpoint, and in Python."""
    for command in READING:
        if command[0] == "verify" and error is CheckpointError:
            assert main(naming(command, checkpoint)) == 1
            assert text in capsys.readouterr().out, "verify lists everything that is wrong"
        else:
            assert text in refused(capsys, *naming(command, checkpoint)), command
    with pytest.raises(error, match=re.escape(text)):
        load_and_shard_model("auto", checkpoint)


# Places ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("./modle", "./modle: no such file or directory; did you mean model?"),
        ("no/such/model/", "no/such/model/: no such file or directory; no/such does not exist either"),
        ("model/config.json", "model/config.json: not a checkpoint; give its directory, its index"),
    ],
)
def test_a_wrong_path(path: str, text: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [command for command in READING if path != "model/config.json" or command[0] != "plan"]
    for command in commands:
        assert text in refused(capsys, *naming(command, path)), command
    with pytest.raises(CheckpointError, match=re.escape(text)):
        load_and_shard_model("auto", path)


def test_a_hub_id_without_a_network(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:  # a port where nobody listens
        unused.bind(("127.0.0.1", 0))
        use_hub(f"http://127.0.0.1:{unused.getsockname()[1]}", here / "cache", monkeypatch)
        for name in ("team/model", "team/model@v2"):
            said = refused(capsys, "inspect", name)
            begin = f"{name}: neither a directory here nor a repository on the hub that can be reached or was"
            assert said.startswith(begin)
            assert said.endswith("; if a directory is meant, check its path; if the hub is, the connection")
            with pytest.raises(CheckpointNotFoundError, match=re.escape(begin)):
                load_and_shard_model("auto", name)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert "downloads are off (local_files_only=True or HF_HUB_OFFLINE)" in refused(
            capsys, "inspect", "team/model"
        )
        huggingface_hub.close_session()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("modle", "; did you mean model?"),
        ("gpt2", ". A hub id is org/name; one without an owner is asked for as hf://gpt2"),
    ],
)
def test_a_name_without_an_owner_is_a_path(
    name: str, hint: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"{name}: no such file or directory{hint}"
    assert refused(capsys, "inspect", name) == text
    with pytest.raises(CheckpointNotFoundError, match=re.escape(text)):
        load_and_shard_model("auto", name)


def test_an_empty_directory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir()
    text = "empty: no checkpoint: expected model.safetensors.index.json or model.safetensors, found no file"
    assert refused(capsys, "inspect", "empty") == text
    assert refused(capsys, "plan", "empty", "--ranks", "2") == text
    with pytest.raises(CheckpointNotFoundError, match=re.escape(text)):
        load_and_shard_model("auto", "empty")


def test_a_directory_above_the_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a training with several checkpoints, say, or of the hub's cache."""
    cached = pruned_checkpoint(here / "models--team--model" / "snapshots" / "0123")
    (here / "model").rename(here / "model-10")
    (here / "run").mkdir()
    (here / "model-10").rename(here / "run" / "checkpoint-10")
    for above, below in ((cached.parents[1].name, "snapshots/0123"), ("run", "checkpoint-10")):
        for command in (["inspect", above], ["plan", above, "--ranks", "2"]):
            assert refused(capsys, *command).endswith(f"found no file; weights are in {above}/{below}")
        assert main(["inspect", f"{above}/{below}"]) == 0
        assert capsys.readouterr().out.startswith(f"{above}/{below}: llama")


# Files ----------------------------------------------------------------------------------------------------


def with_first_shard(here: Path, content: bytes) -> str:
    (here / "model" / "model-00001-of-00002.safetensors").write_bytes(content)
    (here / "model").rename(here / "broken")
    pruned_checkpoint(here / "model")
    return "broken"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            POINTER,
            "it is a git-LFS pointer, the file itself was not fetched: run `git lfs pull` in its folder",
        ),
        (
            b"<html>404</html>",
            "it looks like a web page, perhaps the error page of a failed download: fetch the",
        ),
        (b"", "model-00001-of-00002.safetensors: the file is empty; an incomplete download or save?"),
    ],
)
def test_a_shard_that_is_none(
    content: bytes, text: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everywhere(capsys, with_first_shard(here, content), CheckpointError, text)


def test_a_shard_that_is_missing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "model").rename(here / "gone")
    pruned_checkpoint(here / "model")
    (here / "gone" / "model-00002-of-00002.safetensors").unlink()
    text = "gone: 1 of the 2 files needed do not exist: model-00002-of-00002.safetensors (12 tensors: "
    for command in (command for command in READING if command[0] != "verify"):
        said = refused(capsys, *naming(command, "gone"))
        assert said.startswith(text), command
        assert said.endswith("fetch them, or correct model.safetensors.index.json")
    with pytest.raises(CheckpointNotFoundError, match=re.escape(text)):
        load_and_shard_model("auto", "gone")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "model/config.json: not valid JSON: "),
        ("[]", "model/config.json: not a config: expected an object, found []"),
    ],
)
def test_a_config_that_is_none(
    content: str, text: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "model" / "config.json").write_text(content)
    for command in (["inspect"], ["plan", "--ranks", "2"], ["infer-config"], ["convert", "copy"]):
        assert text in refused(capsys, *naming(command, "model")), command
    assert main(["verify", "model"]) == 1
    assert text in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=re.escape(text)):
        load_and_shard_model("auto", "model")


def test_weights_without_a_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "model" / "config.json").unlink()
    assert main(["plan", "model", "--ranks", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("3 blocks over 2 ranks by bytes")
    assert "note: there is no config.json: blocks at the end without any tensor are not counted" in shown
    assert refused(capsys, "plan", "model", "--ranks", "2", "--memory", "1GB") == (
        "model: there is no config.json, without which only the bytes in files can be counted: leave out "
        "--memory and --by, or write a config.json"
    )
    assert "model/config.json: no such file" in refused(capsys, "infer-config", "model")
    with pytest.raises(CheckpointNotFoundError, match=r"model has no config\.json; pass model_config=. if"):
        load_and_shard_model("auto", "model")


# Room and ranks -------------------------------------------------------------------------------------------


def test_too_little_memory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "the model does not fit: it takes 191.23 kB and 2 ranks may take 180.00 kB; in the split that comes "
        "closest, rank 1 (blocks 1-3) takes 104.96 kB of its 90.00 kB, 14.96 kB too much; it fits on 3 ranks "
        "with 90.00 kB each"
    )
    assert main(["plan", "model", "--ranks", "2", "--length", "64", "--memory", "90000"]) == 1
    assert capsys.readouterr().out.endswith(f"\n{text}\n")
    with pytest.raises(OwnershipError, match=re.escape(text)):
        plan_ownership("model", 2, by="bytes+kv", length=64, budgets="90 kB")


OUT_OF_MEMORY = """
import resource, sys
from sharded_ckpt import load_and_shard_model
load_and_shard_model("auto", "model", materialize=True)  # what imports take is not the point
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, resource.RLIM_INFINITY))
try:
    load_and_shard_model("auto", "large", materialize=True)
except MemoryError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_a_shard_that_does_not_fit_into_memory(here: Path) -> None:
    """Really: a process that may take 256 MB more, and blocks of which one tensor takes 512 MB."""
    words = 4_000_000
    ends = {name: [words, 64] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    hollow_checkpoint(here / "large", llama_shapes() | ends, {**LLAMA, "vocab_size": words})
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "ShardMemoryError large: this rank's blocks do not fit into the memory of cpu:"
    )
    assert "they take 1.02 GB in the files" in done.stdout
    assert "Own fewer blocks, over more ranks (`sharded-ckpt plan` with --memory says how" in done.stdout


def test_more_ranks_than_blocks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model", "--ranks", "6"]) == 0
    assert "note: ranks 4-5 own nothing: 4 blocks for 6 ranks\n" in capsys.readouterr().out
    assert plan_ownership("model", 6).blocks[3:] == ((3,), (), ())


def test_blocks_that_do_not_exist(here: Path) -> None:
    with pytest.raises(OwnershipError, match="owned_block_indexes has 4, 5; this model has blocks 0-3"):
        load_and_shard_model("auto", "model", range(3, 6))
    with pytest.raises(OwnershipError, match="owned_block_indexes is '1,2'; it must be a set of ints"):
        load_and_shard_model("auto", "model", "1,2")


def test_a_missing_launcher(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = load_and_shard_model("auto", "model", {1})
    text = "There is only one rank: start several with `torchrun --nproc-per-node N script.py`, and"
    with pytest.raises(OwnershipError, match=re.escape(text)):
        PipelineStage(shard)
    with pytest.raises(PartialModelError, match="Run it as a stage of a pipeline over the ranks"):
        shard.generate()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match=r"2 processes were started .* but torch.distributed is not init"):
        default_runtime()


def test_ranks_that_cannot_meet(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert refused(capsys, "generate", "--model", "model", "--prompt", "x") == (
        "RANK is set and MASTER_ADDR is not, so the ranks cannot meet: start them with torchrun or "
        "accelerate (see --help), or unset RANK to work alone"
    )


# Words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "text"),
    [
        (
            lambda: load_and_shard_model("model", "auto"),
            "the descriptor comes first, then the checkpoint: load_and_shard_model('auto', 'model')",
        ),
        (
            lambda: load_and_shard_model("llma", "model"),
            "transformers knows no model family 'llma'; a family is named as model_type in config.json",
        ),
        (
            lambda: load_and_shard_model("qwen3", "model"),
            "the descriptor is of family 'qwen3', the config of family 'llama'",
        ),
        (
            lambda: load_and_shard_model("auto", "model", dtype="bf16"),
            'dtype is \'bf16\'; expected a floating one: "bfloat16", "float16", "float32", …, or "auto"',
        ),
        (
            lambda: load_and_shard_model("auto", "model", device="gpu"),
            "device 'gpu' cannot be used here: ",
        ),
        (
            lambda: load_and_shard_model("auto", "model", device="xpu:77"),
            'leave device out to take an accelerator where there is one, or pass "cpu"',
        ),
        (
            lambda: load_and_shard_model("auto", "model", block_configs=[{}] * 3),
            "too few block configs: 3 for num_hidden_layers=4; give one for each layer",
        ),
    ],
)
def test_a_word_that_is_not_meant_so(load: Callable[[], Any], text: str, here: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        load()


def test_a_dialect_that_cannot_say_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", "model", "copy", "--dialect", "nemotron"])
    assert caught.value.code == 2
    assert "argument --dialect: invalid choice: 'nemotron'" in capsys.readouterr().err
    assert refused(capsys, "convert", "model", "copy", "--dialect", "nemotron-nas") == (
        "block 0: ffn.intermediate_size=96 cannot be said as ffn_mult, whose widths are multiples of 256; "
        "choose 256, or another dialect"
    )
    assert not (here / "copy").exists()


def test_a_dialect_of_another_family(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**LLAMA, "block_configs": [{"attention": {"heads": 2}, "ffn": {}}] * 4}
    hollow_checkpoint(here / "odd", llama_shapes(), config)
    text = "block 0: 'heads' of attention is not a field of the anymodel dialect; known fields: "
    assert text in refused(capsys, "plan", "odd", "--ranks", "2")
    with pytest.raises(ConfigError, match=text):
        load_and_shard_model("auto", "odd")


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (["--micro-batches", "few"], "argument --micro-batches: 'few' is not a positive whole number"),
        (["--max-new-tokens", "0"], "argument --max-new-tokens: '0' is not a positive whole number"),
        (["--temperature", "0"], "argument --temperature: '0' is not a number above 0"),
        (["--timeout", "0"], "argument --timeout: '0' is not a number above 0"),
        (["--top-p", "1.5"], "argument --top-p: '1.5' is not a number above 0 and of at most 1"),
    ],
)
def test_an_option_that_cannot_be(option: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--model", "model", "--prompt", "x", *option])
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_generating_with_what_is_not_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", "model", "--device", "cpu"]
    assert "'prompts.txt'" in refused(capsys, *argv, "--prompt-file", "prompts.txt")
    (here / "prompts.txt").write_text("\n\n")
    assert refused(capsys, *argv, "--prompt-file", "prompts.txt") == (
        "prompts.txt: there is no prompt in it, expected one a line"
    )
    (here / "prompts.txt").write_bytes("Grüße".encode("latin-1"))
    said = refused(capsys, *argv, "--prompt-file", "prompts.txt")
    assert said.startswith("prompts.txt: not a text in UTF-8, expected a prompt a line: ")
    said = refused(capsys, *argv, "--prompt", "x")
    assert said.startswith("model: its files make no tokenizer (")
    assert said.endswith("); put the tokenizer files of its parent beside the weights")
    assert "device 'gpu' cannot be used here" in refused(
        capsys, "generate", "--model", "model", "--prompt", "x", "--device", "gpu"
    )


# The network ----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Nothing can be reached, and who tries is in this list: libraries may keep an error to themselves."""
    tried: list[Any] = []

    def refuse(*args: Any, **_: Any) -> Any:
        tried.append(args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tried


def test_a_local_path_reaches_for_no_network(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_folder(tmp_path / "tiny"))
    commands = (
        ["inspect", model],
        ["verify", model, "--scan"],
        ["plan", model, "--ranks", "2", "--memory", "1GB", "--by", "bytes+kv"],
        ["infer-config", model],
        ["diff", model, model],
        ["convert", model, str(tmp_path / "copy"), "--shards", "2"],
        ["generate", "--model", model, "--prompt", "The sea", "--max-new-tokens", "2", "--device", "cpu"],
    )
    for command in commands:
        assert main(command) == 0, capsys.readouterr().err
        assert asked == [], command
    load_and_shard_model("auto", model, {1, 2})
    load_and_shard_model("auto", Path(model), route="converted")
    plan_ownership(model, 2)
    assert asked == []


def test_somebody_who_asks_is_noticed(asked: list[Any], here: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        load_and_shard_model("auto", "team/model")
    assert asked
    huggingface_hub.close_session()


# The end of a pipe ----------------------------------------------------------------------------------------


def test_no_command_shows_a_traceback_of_an_expected_error(here: Path) -> None:
    for argv in (
        ["inspect", "./modle"],
        ["plan", "./modle", "--ranks", "2"],
        ["verify", "./modle", "--json"],
    ):
        done = subprocess.run([sys.executable, "-m", "sharded_ckpt", *argv], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1


def test_json_says_why_a_model_does_not_fit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model", "--ranks", "2", "--memory", "90kB", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["misfit"].startswith("the model does not fit: ")


def test_a_prompt_is_a_line_and_not_an_empty_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = str(tiny_folder(tmp_path / "model")), tmp_path / "prompts.txt"
    argv = ["generate", "--model", folder, "--device", "cpu", "--max-new-tokens", "1"]
    file.write_bytes("\ufeffone\u2028line\r\n\nanother\n".encode())
    assert main([*argv, "--prompt-file", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["prompt"] for each in told] == ["one\u2028line", "another"]
    for prompts in (["--prompt", ""], ["--prompt", "x", "--prompt", ""]):
        assert "a prompt is empty, and this tokenizer begins no text" in refused(capsys, *argv, *prompts)
