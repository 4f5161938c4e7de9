"""Saving whole checkpoints: the config in the dialect it came in, and the small files that come along."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import files_in
from support.compare import assert_same_tensors
from support.tiny import (
    BLOCKS,
    FAMILIES,
    Block,
    heterogeneous_checkpoint,
    tensors_of,
    tiny_checkpoint,
    tiny_config,
    tiny_model,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from patchers import AttentionConfig, BlockConfig, FFNConfig, deci_x_patcher, read_block_configs
from patchers.errors import BlockConfigError, CheckpointNotFoundError, ConfigError, MissingKeysError
from sharded_ckpt.checkpoint.source import open_source
from sharded_ckpt.config import load_model_config
from sharded_ckpt.loading.verbs import load_and_shard_model
from sharded_ckpt.saving.carried_files import carried_names
from sharded_ckpt.saving.verbs import save_sharded_checkpoint

DROPPED: list[Block] = [(2, 96), ("no_op", 96), (2, "no_op"), ("linear", 96)]
SAYABLE: list[Block] = [(2, 96), ("no_op", 48), (1, "no_op"), (4, 96)]  # in every dialect but nemotron-nas


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def json_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return load_and_shard_model("auto", folder, **options)


def with_small_files(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_decilm.py"):
        (folder / name).write_text(json.dumps({"of": folder.name}))
    return folder


# The config ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_homogeneous_checkpoint_is_what_save_pretrained_writes(shared, tmp_path, family):
    folder = tiny_checkpoint(shared, family, tied=family == "qwen3", dtype=torch.bfloat16)
    model = load(folder)
    before = copy.deepcopy(model.config)
    save_sharded_checkpoint(model, tmp_path / "ours")
    assert model.config.to_dict() == before.to_dict()
    model.save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "generation_config.json"):
        assert json_of(tmp_path / "ours", name) == json_of(tmp_path / "theirs", name)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_same_tensors(opened, AutoModelForCausalLM.from_pretrained(folder))
    assert opened.generation_config.eos_token_id == [2, 3]


@pytest.mark.parametrize("tied", [False, True])
def test_an_anymodel_config_is_saved_with_exactly_the_origins_fields(shared, tmp_path, tied, caplog):
    folder = heterogeneous_checkpoint(shared, tied=tied)
    model = load(folder)
    save_sharded_checkpoint(model, tmp_path / "c")
    assert json_of(tmp_path / "c") == json_of(folder)
    assert_same_tensors(load(tmp_path / "c"), model)
    with deci_x_patcher("llama"):
        assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "c"), model)
    assert caplog.text == ""


def test_plain_from_pretrained_refuses_a_heterogeneous_checkpoint_whose_shapes_differ(shared, tmp_path):
    save_sharded_checkpoint(load(heterogeneous_checkpoint(shared)), tmp_path / "c")
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "c")


def test_a_checkpoint_that_only_lacks_sub_blocks_warns_once_since_plain_transformers_opens_it(
    shared, tmp_path, caplog
):
    model = load(heterogeneous_checkpoint(shared, blocks=DROPPED))
    save_sharded_checkpoint(model, tmp_path / "c")
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'c'}: blocks 1-3 lack sub-blocks, and no shape differs from a plain model's. "
        "transformers' own from_pretrained opens this checkpoint without an error and gives those parts "
        "random weights: open it with load_and_shard_model, or inside deci_x_patcher"
    ]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "c")  # no error: the reason for the warning
    assert len(list(opened.parameters())) > len(list(model.parameters()))
    assert_same_tensors(load(tmp_path / "c"), model)


def test_block_configs_set_as_objects_are_written_as_anymodel_and_stay_objects(tmp_path):
    blocks = [BlockConfig(), BlockConfig(AttentionConfig(no_op=True), FFNConfig(48))]
    config = tiny_model(layers=2).config
    config.block_configs = blocks
    with deci_x_patcher("llama"):
        model = AutoModelForCausalLM.from_config(config)
    save_sharded_checkpoint(model, tmp_path / "c")
    assert model.config.block_configs == blocks
    assert all(isinstance(block, BlockConfig) for block in model.config.block_configs)
    written = json_of(tmp_path / "c")["block_configs"]
    assert written[1]["ffn"]["intermediate_size"] == 48
    assert written[1]["attention"]["no_op"] is True
    assert_same_tensors(load(tmp_path / "c"), model)


def test_blocks_of_a_mixture_may_leave_their_experts_to_the_config(tmp_path):
    blocks = [BlockConfig(AttentionConfig(no_op=True)), BlockConfig(), BlockConfig(), BlockConfig()]
    with deci_x_patcher("mixtral", blocks):
        model = AutoModelForCausalLM.from_config(tiny_config("mixtral")).eval()
    model.config.block_configs = blocks
    save_sharded_checkpoint(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["block_configs"]
    assert ["ffn" in block for block in written] == [False] * 4
    again = load_and_shard_model("auto", tmp_path / "out")
    assert type(again.model.layers[0].self_attn).__name__ == "NoAttention"
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_config_says_the_dtype_of_the_tensors(shared, tmp_path):
    model = load(tiny_checkpoint(shared)).to(torch.bfloat16)
    save_sharded_checkpoint(model, tmp_path / "c")
    assert json_of(tmp_path / "c")["dtype"] == "bfloat16"
    assert model.config.dtype == torch.float32
    assert load(tmp_path / "c").dtype == torch.bfloat16


def test_a_live_per_layer_config_is_saved_as_one(shared, tmp_path):
    folder = shutil.copytree(heterogeneous_checkpoint(shared, blocks=SAYABLE), tmp_path / "parent")
    save_sharded_checkpoint(load(folder), tmp_path / "a", dialect="per-layer")
    assert "block_configs" not in json_of(tmp_path / "a")
    model = load(tmp_path / "a")
    save_sharded_checkpoint(model, tmp_path / "b")
    assert json_of(tmp_path / "b")["per_layer_config"] == json_of(tmp_path / "a")["per_layer_config"]
    assert_same_tensors(load(tmp_path / "b"), load(folder))


# Dialects --------------------------------------------------------------------------------------------------


def test_every_dialect_can_be_asked_for_and_loads_alike(shared, tmp_path):
    model = load(heterogeneous_checkpoint(shared, blocks=SAYABLE))
    expected = read_block_configs(model.config.to_dict())[0]
    for dialect in ("anymodel", "per-layer", "megatron"):
        save_sharded_checkpoint(model, tmp_path / dialect, dialect=dialect)
        raw = json_of(tmp_path / dialect)
        assert read_block_configs(raw)[1].value == dialect
        assert read_block_configs(load_model_config(tmp_path / dialect).to_dict()) is not None
        assert_same_tensors(load(tmp_path / dialect), model)
        if dialect != "per-layer":
            assert read_block_configs(raw)[0] == expected


@pytest.mark.parametrize(
    ("dialect", "blocks", "text"),
    [
        (
            "per-layer",
            DROPPED,
            "block 3: attention.replace_with_linear cannot be said in per-layer; write nemotron-nas",
        ),
        (
            "nemotron-nas",
            SAYABLE,
            "block 0: ffn.intermediate_size=96 cannot be said as ffn_mult, whose widths are multiples of 256",
        ),
        ("decilm", SAYABLE, "'decilm' is not a dialect; known dialects: nemotron-nas, "),
    ],
)
def test_a_dialect_that_cannot_say_a_block_is_refused_and_nothing_is_written(
    shared, tmp_path, dialect, blocks, text
):
    model = load(heterogeneous_checkpoint(shared, blocks=blocks))
    with pytest.raises(BlockConfigError) as raised:
        save_sharded_checkpoint(model, tmp_path / "c", dialect=dialect)
    assert text in str(raised.value)
    assert files_in(tmp_path) == []


def test_a_nemotron_nas_checkpoint_is_saved_as_it_was_published(shared, tmp_path, caplog):
    folder = heterogeneous_checkpoint(shared, dialect="nemotron_nas")
    parent = with_small_files(shutil.copytree(folder, tmp_path / "parent"))
    model = load(parent)
    save_sharded_checkpoint(model, tmp_path / "c")
    assert json_of(tmp_path / "c") == json_of(folder)
    assert (tmp_path / "c" / "modeling_decilm.py").read_text() == '{"of": "parent"}'
    again = load(tmp_path / "c")
    assert_same_tensors(again, model)
    assert again.config.to_dict() == model.config.to_dict()
    assert caplog.text == ""


def test_a_nemotron_nas_config_follows_changes_that_it_can_say(shared, tmp_path):
    model = load(heterogeneous_checkpoint(shared, dialect="nemotron_nas"), dtype=torch.bfloat16)
    model.resize_token_embeddings(130, mean_resizing=False)
    model.config.block_configs[0]["ffn"]["ffn_mult"] = 12.0  # a width of 512
    wide = tiny_model(layers=1, intermediate_size=512, dtype=torch.bfloat16)
    model.model.layers[0].mlp = wide.model.layers[0].mlp
    save_sharded_checkpoint(model, tmp_path / "c")
    raw = json_of(tmp_path / "c")
    assert (raw["model_type"], raw["vocab_size"], raw["torch_dtype"]) == ("nemotron-nas", 130, "bfloat16")
    assert raw["block_configs"][0]["ffn"]["ffn_mult"] == 12.0
    assert raw["intermediate_size"] is None
    assert_same_tensors(load(tmp_path / "c"), model)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("dialect", ""),
        (
            "unsayable",
            "llama config, since the nemotron-nas config that it came in cannot say rope_parameters",
        ),
        ("source gone", "no such file or directory"),
    ],
)
def test_where_nemotron_nas_cannot_be_restored_the_native_config_is_saved(
    shared, tmp_path, how, told, caplog
):
    folder = shutil.copytree(heterogeneous_checkpoint(shared, dialect="nemotron_nas"), tmp_path / "parent")
    model = load(folder, materialize=True)
    options = {"dialect": "anymodel"} if how == "dialect" else {}
    if how == "unsayable":
        model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    elif how == "source gone":
        shutil.rmtree(folder)
    save_sharded_checkpoint(model, tmp_path / "c", **options)
    raw = json_of(tmp_path / "c")
    assert (raw["model_type"], raw["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert read_block_configs(raw)[1].value == ("anymodel" if how == "dialect" else "nemotron-nas")
    saved, kept = load(tmp_path / "c").state_dict(), model.state_dict()
    assert saved.keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in saved.items())
    assert told in caplog.text
    assert bool(told) is bool(caplog.text)


# The blocks that the tensors are ---------------------------------------------------------------------------


def pruned(folder: Path) -> PreTrainedModel:
    """A model whose FFN of block 1 was exchanged for a narrower one, and nobody told the config."""
    model = load(folder)
    narrow = tiny_model(layers=1, intermediate_size=48, seed=1)
    model.model.layers[1].mlp = narrow.model.layers[0].mlp
    return model


def test_a_config_that_does_not_describe_the_tensors_is_refused_by_block(shared, tmp_path):
    with pytest.raises(BlockConfigError) as raised:
        save_sharded_checkpoint(pruned(tiny_checkpoint(shared)), tmp_path / "c")
    assert "block 1: the config says BlockConfig(" in str(raised.value)
    assert "ffn=FFNConfig(intermediate_size=96)" in str(raised.value)
    assert "its tensors BlockConfig(" in str(raised.value)
    assert "ffn=FFNConfig(intermediate_size=48)" in str(raised.value)
    assert (
        'Nothing was saved. Pass block_configs=… to say what the blocks are, or block_configs="infer"'
        in str(raised.value)
    )
    assert files_in(tmp_path) == []


def test_tensors_that_contradict_each_other_are_refused_by_block(shared, tmp_path):
    model = load(tiny_checkpoint(shared))
    model.model.layers[2].mlp.up_proj = nn.Linear(64, 50, bias=False)
    with pytest.raises(BlockConfigError, match=r"block 2: .*model\.layers\.2\.mlp\.up_proj\.weight"):
        save_sharded_checkpoint(model, tmp_path / "c", block_configs="infer")


@pytest.mark.parametrize("kind", ["plain", "anymodel"])
def test_blocks_exchanged_in_memory_are_inferred_when_asked(shared, tmp_path, kind):
    folder = tiny_checkpoint(shared) if kind == "plain" else heterogeneous_checkpoint(shared, blocks=BLOCKS)
    model = load(folder)
    model.model.layers[0].mlp = tiny_model(layers=1, intermediate_size=40).model.layers[0].mlp
    save_sharded_checkpoint(model, tmp_path / "c", block_configs="infer")
    assert json_of(tmp_path / "c")["block_configs"][0]["ffn"]["intermediate_size"] == 40
    assert_same_tensors(load(tmp_path / "c"), model)


def test_inferring_the_blocks_of_a_plain_model_leaves_its_config_plain(shared, tmp_path):
    save_sharded_checkpoint(load(tiny_checkpoint(shared)), tmp_path / "c", block_configs="infer")
    assert "block_configs" not in json_of(tmp_path / "c")


def test_blocks_may_be_told_in_place_of_the_configs(shared, tmp_path):
    blocks = [BlockConfig(), BlockConfig(ffn=FFNConfig(48)), *[BlockConfig()] * 2]
    model = pruned(tiny_checkpoint(shared))
    save_sharded_checkpoint(model, tmp_path / "c", block_configs=blocks, dialect="per-layer")
    assert json_of(tmp_path / "c")["per_layer_config"] == {"1": {"intermediate_size": 48}}
    assert_same_tensors(load(tmp_path / "c"), model)
    with pytest.raises(BlockConfigError, match="too few block configs: 1 for num_hidden_layers=4"):
        save_sharded_checkpoint(model, tmp_path / "c", block_configs=blocks[:1])


# A dict ----------------------------------------------------------------------------------------------------


def test_a_dict_needs_a_config_and_becomes_a_checkpoint_with_it(shared, tmp_path):
    folder = heterogeneous_checkpoint(shared)
    tensors = tensors_of(folder)
    with pytest.raises(ConfigError, match=r"pass config=… with a dict of tensors .* found NoneType"):
        save_sharded_checkpoint(tensors, tmp_path / "c")
    save_sharded_checkpoint(tensors, tmp_path / "c", config=load_model_config(folder), source=folder)
    assert json_of(tmp_path / "c") == json_of(folder)
    assert json_of(tmp_path / "c", "generation_config.json") == json_of(folder, "generation_config.json")
    assert_same_tensors(load(tmp_path / "c"), load(folder))


def test_a_dict_that_lacks_tensors_of_a_block_is_refused(shared, tmp_path):
    folder = heterogeneous_checkpoint(shared)
    tensors = {name: t for name, t in tensors_of(folder).items() if "layers.0.mlp" not in name}
    with pytest.raises(BlockConfigError, match=r"block 0: .*its tensors .*FFNConfig\(no_op=True\)"):
        save_sharded_checkpoint(tensors, tmp_path / "c", config=load_model_config(folder))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_dict_that_lacks_an_end_of_the_model_is_refused(shared, tmp_path, name):
    folder = tiny_checkpoint(shared)
    tensors = {key: tensor for key, tensor in tensors_of(folder).items() if key != name}
    with pytest.raises(MissingKeysError, match=f"there is no tensor of {name.removesuffix('.weight')}: "):
        save_sharded_checkpoint(tensors, tmp_path / "c", config=load_model_config(folder))


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.embed_tokens.weight", None])
def test_a_dict_of_a_tied_model_needs_one_end_and_writes_one(shared, tmp_path, missing):
    folder = tiny_checkpoint(shared, tied=True)
    model = load(folder)
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key != missing}
    save_sharded_checkpoint(tensors, tmp_path / "c", config=model.config)
    assert len(tensors_of(tmp_path / "c")) == len(tensors_of(folder))
    assert_same_tensors(load(tmp_path / "c"), model)


def test_a_dict_whose_tied_ends_have_diverged_untie_the_config(shared, tmp_path, caplog):
    model = load(tiny_checkpoint(shared, tied=True))
    tensors = {**model.state_dict(), "lm_head.weight": torch.zeros(128, 64)}
    save_sharded_checkpoint(tensors, tmp_path / "c", config=model.config)
    assert json_of(tmp_path / "c")["tie_word_embeddings"] is False
    assert "hold different values: both were written" in caplog.text


def test_what_is_no_transformers_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a Linear is no transformers model and has no config of one"):
        save_sharded_checkpoint(nn.Linear(2, 2), tmp_path / "c")
    with pytest.raises(ConfigError, match="block_configs is a list of blocks, or 'infer', not 'auto'"):
        save_sharded_checkpoint(tiny_model(), tmp_path / "c", block_configs="auto")


# Small files -----------------------------------------------------------------------------------------------

CARRIED = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "qwen.tiktoken", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "modeling_decilm.py"),
    *("LICENSE", "LICENSE.txt", "NOTICE", "generation_config.json"),
    *("additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja"),
]
LEFT = [
    *(
        "model.safetensors",
        "tokenizer.safetensors",
        "pytorch_model.bin",
        "vocab.pt",
        "tokenizer.gguf",
        "a.pth",
    ),
    *("a.pth", "model.safetensors.index.json", "tokenizer.index.json", "config.json", ".hidden.py"),
    *("README.md", "training_args.bin", "optimizer.pt", "code/modeling.py", ".git/config.py", "notes.txt"),
    *("additional_chat_templates/.rag.jinja", "additional_chat_templates/model.safetensors"),
]


@pytest.mark.parametrize("auto_map", [{"AutoConfig": "configuration_decilm.DeciLMConfig"}, None])
def test_small_files_are_carried_by_rule_and_weights_never(tmp_path, auto_map):
    for name in (*CARRIED, *LEFT):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map} if auto_map else {}))
    expected = [name for name in CARRIED if auto_map or not name.endswith(".py")]
    assert set(carried_names(open_source(tmp_path))) == set(expected)


def test_small_files_come_from_where_the_model_was_loaded(shared, tmp_path):
    parent = with_small_files(shutil.copytree(tiny_checkpoint(shared), tmp_path / "parent"))
    (parent / ".cache").mkdir()
    (parent / "training_args.bin").write_bytes(b"pickle")
    save_sharded_checkpoint(load(parent), tmp_path / "ours")
    found = set(files_in(tmp_path / "ours"))
    assert found == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "model-00001-of-00001.safetensors"),
        "model.safetensors.index.json",
    }
    assert (tmp_path / "ours" / "tokenizer_config.json").read_text() == '{"of": "parent"}'
    save_sharded_checkpoint(AutoModelForCausalLM.from_pretrained(parent), tmp_path / "theirs")
    assert set(files_in(tmp_path / "theirs")) == found


def test_small_files_may_come_from_elsewhere(shared, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    save_sharded_checkpoint(load(tiny_checkpoint(shared)), tmp_path / "c", source=with_small_files(other))
    assert (tmp_path / "c" / "tokenizer.json").read_text() == '{"of": "other"}'
    with pytest.raises(CheckpointNotFoundError, match="no such file or directory"):
        save_sharded_checkpoint(load(tiny_checkpoint(shared)), tmp_path / "d", source=tmp_path / "missing")


def test_after_a_chdir_small_files_still_come_from_where_the_model_was_loaded(shared, tmp_path, monkeypatch):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        with_small_files(shutil.copytree(tiny_checkpoint(shared), tmp_path / place / "parent"))
    (tmp_path / "there" / "parent" / "tokenizer.json").write_text("of a namesake")
    monkeypatch.chdir(tmp_path / "here")
    model = load(Path("parent"))
    monkeypatch.chdir(tmp_path / "there")
    save_sharded_checkpoint(model, "child")
    assert Path("child/tokenizer.json").read_text() == '{"of": "parent"}'


def test_a_source_that_is_gone_is_told_and_the_model_is_saved(shared, tmp_path, caplog):
    parent = shutil.copytree(tiny_checkpoint(shared), tmp_path / "parent")
    model = load(parent, materialize=True)
    shutil.rmtree(parent)
    save_sharded_checkpoint(model, tmp_path / "c")
    assert f"the tokenizer and other small files of {parent} are not carried over" in caplog.text
    assert "pass source=…" in caplog.text
    assert_same_tensors(load(tmp_path / "c"), model)


def test_a_checkpoint_saved_over_itself_keeps_its_small_files(shared, tmp_path):
    parent = with_small_files(shutil.copytree(tiny_checkpoint(shared), tmp_path / "parent"))
    (parent / "README.md").write_text("mine")
    model = load(parent)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_sharded_checkpoint(model, parent)
    assert (parent / "tokenizer.json").read_text() == '{"of": "parent"}'
    assert (parent / "README.md").read_text() == "mine"
    assert sorted(parent.glob("*.safetensors")) == [parent / "model-00001-of-00001.safetensors"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(parent).state_dict().items())
    assert AutoConfig.from_pretrained(parent).to_dict()["num_hidden_layers"] == 4
