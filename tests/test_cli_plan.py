"""`sharded-ckpt plan`: who would own what, what that reads, and whether it fits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from support.fake_hub import REPO, FakeHub, serve, use_hub
from support.hollow import LLAMA, hollow_checkpoint, llama_shapes, pruned_checkpoint, without

from sharded_ckpt import plan_ownership
from sharded_ckpt.cli import main
from sharded_ckpt.report.overview import overview
from sharded_ckpt.report.rank_reads import rank_reads


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pruned_checkpoint(tmp_path / "model")


def planned(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> dict[str, Any]:
    assert main(["plan", *argv, "--json"]) == code
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_the_plan_is_that_of_the_planner_beside_an_even_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(folder), "--ranks", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{plan_ownership(str(folder), 2)}\n\n")
    assert text.endswith(f"an even split by number:\n{plan_ownership(str(folder), 2, split='even')}\n")
    assert "rank  reads     of files  to download\n0     78.08 kB  1         0 B\n" in text


def test_ranks_together_read_every_byte_once(folder: Path) -> None:
    reads = rank_reads(folder, plan_ownership(str(folder), 3))
    assert sum(read.nbytes for read in reads) == overview(folder).nbytes
    assert all(read.download == 0 for read in reads)


def test_a_tied_head_reads_the_embedding_again(tmp_path: Path) -> None:
    shapes = without(llama_shapes(), "lm_head")
    folder = hollow_checkpoint(tmp_path / "tied", shapes, {**LLAMA, "tie_word_embeddings": True})
    first, last = rank_reads(folder, plan_ownership(str(folder), 2))
    assert first.nbytes + last.nbytes == overview(folder).nbytes + 2 * 128 * 64
    (alone,) = rank_reads(folder, plan_ownership(str(folder), 1))
    assert alone.nbytes == overview(folder).nbytes


def test_memory_is_weights_and_cache_whatever_is_shared_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(folder), "--ranks", "2", "--length", "64", "--memory"]
    fits = planned(capsys, 0, *argv, "200kB")
    assert (fits["fits"], fits["misfit"]) == (True, None)
    cache = [
        row["memory"] - row["cost"] for row in fits["ranks"]
    ]  # K and V of 2 heads of 16, 64 tokens, bf16
    assert cache == [2 * 2 * 16 * 64 * 2] * 2
    tight = planned(capsys, 1, *argv, "90kB")
    assert tight["fits"] is False
    assert tight["misfit"].startswith(
        "the model does not fit: it takes 191.23 kB and 2 ranks may take 180.00 kB"
    )
    assert tight["misfit"].endswith("it fits on 3 ranks with 90.00 kB each")


def test_unequal_ranks_get_what_they_can_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--ranks", "2", "--by", "bytes+kv", "--length", "64"]
    said = planned(capsys, 0, str(folder), *argv, "--memory", "130kB", "--memory", "80kB")
    assert [row["blocks"] for row in said["ranks"]] == [[0, 1], [2, 3]]


def test_quantised_weights_are_counted_as_they_are_stored(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = planned(capsys, 0, str(folder), "--ranks", "3")
    quantise(folder, "x")
    assert planned(capsys, 0, str(folder), "--ranks", "3") == plain | {"notes": [NOTE.format("x")]}


def test_the_memory_of_quantised_weights_is_what_they_take_once_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Headers say BF16 here, whatever the config says: what is loaded has the config's dtype."""
    argv = [str(folder), "--ranks", "2", "--length", "64", "--memory", "200kB"]
    plain = planned(capsys, 0, *argv)
    quantise(folder, "fp8")
    assert planned(capsys, 0, *argv) == plain | {"notes": [NOTE.format("fp8")]}
    assert main(["plan", *argv]) == 0
    assert f"\n\nnote: {NOTE.format('fp8')}\n\nit fits\n" in capsys.readouterr().out
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert planned(capsys, 0, *argv)["ranks"] == plain["ranks"], "a quantised config alone will do"


def test_what_weights_of_an_unknown_coding_take_in_memory_is_not_guessed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantise(folder, "gptq")
    assert main(["plan", str(folder), "--ranks", "2", "--memory", "1GB"]) == 1
    text = "the weights are quantised by gptq, which is not read here (fp8 and mxfp4 are), so it is not known"
    assert text in capsys.readouterr().err


NOTE = (
    'the weights are quantised ({}): "bytes" are those of the files where there are any, "bytes+kv" those in '
    "memory, where weights are dequantised as they are loaded"
)


def quantise(folder: Path, method: str) -> None:
    """Let the config say that the weights are quantised."""
    config = json.loads((folder / "config.json").read_text())
    said = {**config, "quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(said))


def test_a_config_alone_will_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_weights = planned(capsys, 0, str(folder), "--ranks", "3")
    alone = folder.parent / "alone" / "any-name.json"
    alone.parent.mkdir()
    alone.write_text((folder / "config.json").read_text())
    for path in (folder / "config.json", alone):
        said = planned(capsys, 0, str(path), "--ranks", "3")
        assert said["ranks"] == with_weights["ranks"]
    assert said["reads"] is None


def test_what_is_not_here_is_counted_as_a_download(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with serve(FakeHub(files)) as hub:
        use_hub(hub.url, tmp_path / "cache", monkeypatch)
        said = planned(capsys, 0, REPO, "--ranks", "2")
        huggingface_hub.close_session()
    for reads in said["reads"]:
        assert reads["download"] == sum(len(files[file]) for file in reads["files"]) > 0


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--memory", "many"], 'budget \'many\' is no size; write "80GiB", "80 GB" or a number'),
        (
            ["--memory", "1GB", "--memory", "2GB"],
            "budgets has 2 entries for 3 ranks; give one, or one for each",
        ),
    ],
)
def test_a_memory_that_cannot_be_read_is_refused(
    argv: list[str], text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(folder), "--ranks", "3", *argv]) == 1
    assert text in capsys.readouterr().err


def test_planning_a_llama_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom sharded_ckpt.cli import main\n"
        f"assert main(['plan', {str(folder)!r}, '--ranks', '2', '--memory', '1GB']) == 0\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")
