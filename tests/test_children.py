"""A child holds what its parent holds, less what was left out: compared with tensors sliced by hand."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.children import (
    Tensors,
    assert_equal,
    averaged,
    blocks_said,
    kept,
    largest_channels,
    linear_attention,
    linear_ffn,
    mean_heads,
    narrowed,
    without,
)
from support.gloo import Gloo
from support.threads import ThreadRank, run_ranks
from support.tiny import heterogeneous_checkpoint, tensors_of, tiny_checkpoint
from transformers import AutoModelForCausalLM

from patchers import AttentionConfig, BlockConfig, FFNConfig
from patchers.errors import BlockConfigError, CheckpointError, CollectiveError, ConfigError, FamilyError
from sharded_ckpt import Runtime, load_and_shard_model, load_model_config
from sharded_ckpt.children import Indexes, Scores, init_child_from_parent

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 8, 4, 8, 96
SIZES = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
IDS = torch.arange(24)[None] % 120

# One block of every kind of change.
CHILD = [
    BlockConfig(),
    BlockConfig(AttentionConfig(2), FFNConfig(40)),
    BlockConfig(AttentionConfig(2), FFNConfig(40)),
    BlockConfig(AttentionConfig(1), FFNConfig(no_op=True)),
    BlockConfig(AttentionConfig(no_op=True), FFNConfig(95)),
    BlockConfig(AttentionConfig(replace_with_linear=True), FFNConfig(1)),
    BlockConfig(AttentionConfig(1), FFNConfig(replace_with_linear=True)),
    BlockConfig(AttentionConfig(no_op=True), FFNConfig(no_op=True)),
]
CHANNELS = {1: "norm", 2: Scores([i % 7 for i in range(WIDTH)]), 4: Indexes(range(1, WIDTH)), 5: "first"}
KEPT = {1: "mean", 2: Indexes([2, 1]), 3: Scores([0.5, 2, 2, 1]), 6: "first"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parents")


def parent_of(folder: Path, family: str = "llama", **options: Any) -> Path:
    return tiny_checkpoint(folder, family, layers=len(CHILD), **SIZES, **options)


def expected_child(parent: Tensors) -> Tensors:
    """What `CHILD` must hold, worked out by hand."""
    attention, ffn = "model.layers.{}.self_attn", "model.layers.{}.mlp"
    child = without(
        parent,
        *(attention.format(i) for i in range(1, 8)),
        *(ffn.format(i) for i in range(1, 8)),
        *(f"model.layers.{i}.input_layernorm" for i in (4, 7)),
        *(f"model.layers.{i}.post_attention_layernorm" for i in (3, 7)),
    )
    child |= averaged(parent, attention.format(1), 2, HEAD_DIM)
    child |= kept(parent, attention.format(2), HEADS, HEAD_DIM, [1, 2])
    child |= kept(parent, attention.format(3), HEADS, HEAD_DIM, [1])
    child |= linear_attention(parent, attention.format(5), HEADS, HEAD_DIM)
    child |= kept(parent, attention.format(6), HEADS, HEAD_DIM, [0])
    names = ("gate_proj", "up_proj", "down_proj")
    by_norm = largest_channels(*(parent[f"model.layers.1.mlp.{name}.weight"] for name in names), keep=40)
    by_score = sorted(sorted(range(WIDTH), key=lambda i: (-(i % 7), i))[:40])
    child |= narrowed(parent, ffn.format(1), by_norm)
    child |= narrowed(parent, ffn.format(2), torch.tensor(by_score))
    child |= narrowed(parent, ffn.format(4), torch.arange(1, WIDTH))
    child |= narrowed(parent, ffn.format(5), torch.arange(1))
    return child | linear_ffn(parent, ffn.format(6))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_kind_of_change_equals_slicing_by_hand(
    shared: Path, tmp_path: Path, family: str, dtype: torch.dtype, tied: bool
) -> None:
    parent = parent_of(shared, family, dtype=dtype, tied=tied)
    report = init_child_from_parent(parent, CHILD, tmp_path / "c", ffn_channels=CHANNELS, kv_heads=KEPT)
    found = tensors_of(tmp_path / "c")
    assert_equal(found, expected_child(tensors_of(parent)))
    index = json.loads((tmp_path / "c/model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(found)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values()) == report.nbytes
    assert ("lm_head.weight" in found) is not tied
    model = load_and_shard_model("auto", tmp_path / "c")
    assert model(IDS).logits.isfinite().all()
    assert report.changed == (1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("tied", [False, True])
def test_biases_of_every_projection_go_with_their_rows(shared: Path, tmp_path: Path, tied: bool) -> None:
    parent = parent_of(shared, attention_bias=True, mlp_bias=True, tied=tied)
    init_child_from_parent(parent, CHILD, tmp_path / "c", ffn_channels=CHANNELS, kv_heads=KEPT)
    assert_equal(tensors_of(tmp_path / "c"), expected_child(tensors_of(parent)))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_child_of_full_width_equals_its_parent(shared: Path, tmp_path: Path, family: str) -> None:
    parent = parent_of(shared, family, dtype=torch.bfloat16)
    said = BlockConfig(AttentionConfig(KV_HEADS), FFNConfig(WIDTH))
    report = init_child_from_parent(parent, [said, BlockConfig()] * 4, tmp_path / "c")
    assert_equal(tensors_of(tmp_path / "c"), tensors_of(parent))
    assert (report.changed, report.warnings) == ((), ())
    assert report.nbytes == report.parent_nbytes
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "c")  # a homogeneous result opens anywhere
    assert torch.equal(plain(IDS).logits, AutoModelForCausalLM.from_pretrained(parent)(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_child_of_a_heterogeneous_parent_shrinks_it_further(
    shared: Path, tmp_path: Path, family: str
) -> None:
    parent = heterogeneous_checkpoint(shared, family, dtype=torch.bfloat16)
    blocks = {
        0: BlockConfig(AttentionConfig(1), FFNConfig(replace_with_linear=True)),
        1: {"ffn": {"intermediate_size": 24}},
        3: BlockConfig(AttentionConfig(no_op=True)),
        4: BlockConfig(AttentionConfig(2), FFNConfig(replace_with_linear=True)),
        "6": {"ffn": {"no_op": True}},
    }
    report = init_child_from_parent(parent, blocks, tmp_path / "c")
    had = tensors_of(parent)
    gone = ["0.self_attn", "0.mlp", "1.mlp", "3.self_attn", "3.input_layernorm", "4.self_attn", "6.mlp"]
    gone.append("6.post_attention_layernorm")
    expected = without(had, *(f"model.layers.{name}" for name in gone))
    expected |= averaged(had, "model.layers.0.self_attn", 1, 16)
    expected |= linear_ffn(had, "model.layers.0.mlp")
    names = ("gate_proj", "up_proj", "down_proj")
    channels = largest_channels(*(had[f"model.layers.1.mlp.{name}.weight"] for name in names), keep=24)
    expected |= narrowed(had, "model.layers.1.mlp", channels)
    expected |= averaged(had, "model.layers.4.self_attn", 2, 16)
    assert_equal(tensors_of(tmp_path / "c"), expected)
    assert report.blocks[2] == BlockConfig(AttentionConfig(1), FFNConfig(no_op=True))  # unsaid: the parent's
    assert report.blocks[5] == BlockConfig(AttentionConfig(no_op=True), FFNConfig(no_op=True))
    assert load_and_shard_model("auto", tmp_path / "c")(IDS).logits.isfinite().all()


def test_kv_heads_kept_by_index_compute_what_the_parent_does_without_the_others(
    shared: Path, tmp_path: Path
) -> None:
    parent = parent_of(shared, "qwen3", seed=3)
    choices: list[Any] = [Indexes([1, 3]), Scores([1, 0, 3, 2]), "first", Indexes([2, 3])] * 2
    left = [[1, 3], [2, 3], [0, 1], [2, 3]] * 2
    init_child_from_parent(parent, [BlockConfig(AttentionConfig(2))] * 8, tmp_path / "c", kv_heads=choices)
    reference = AutoModelForCausalLM.from_pretrained(parent)
    group = HEADS // KV_HEADS * HEAD_DIM
    with torch.no_grad():
        for block, heads in zip(reference.model.layers, left, strict=True):
            for head in set(range(KV_HEADS)) - set(heads):
                block.self_attn.o_proj.weight[:, head * group : (head + 1) * group] = 0
    model = load_and_shard_model("auto", tmp_path / "c")
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_number_of_kv_heads_that_does_not_divide_the_parents_can_be_kept(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8, "hidden_size": 96}
    parent = tiny_checkpoint(tmp_path, layers=2, shards=1, **sizes)
    asked = [BlockConfig(AttentionConfig(4))] * 2
    init_child_from_parent(parent, asked, tmp_path / "c", kv_heads=[Indexes([0, 2, 3, 5]), "first"])
    had, found = tensors_of(parent), tensors_of(tmp_path / "c")
    for index, heads in enumerate(([0, 2, 3, 5], [0, 1, 2, 3])):
        prefix = f"model.layers.{index}.self_attn"
        part = {name: tensor for name, tensor in found.items() if name.startswith(f"{prefix}.")}
        assert_equal(part, kept(had, prefix, 12, 8, heads))
    reference = AutoModelForCausalLM.from_pretrained(parent)
    with torch.no_grad():
        for block, heads in zip(reference.model.layers, ([1, 4], [4, 5]), strict=True):
            for head in heads:
                block.self_attn.o_proj.weight[:, head * 16 : (head + 1) * 16] = 0
    model = load_and_shard_model("auto", tmp_path / "c")
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)


def test_queries_attend_to_the_mean_that_their_kv_head_is_part_of(shared: Path, tmp_path: Path) -> None:
    parent = parent_of(shared, "qwen2", seed=4)
    init_child_from_parent(parent, [BlockConfig(AttentionConfig(2))] * 8, tmp_path / "c")
    reference = AutoModelForCausalLM.from_pretrained(parent)
    with torch.no_grad():
        for block in reference.model.layers:
            for projection in (block.self_attn.k_proj, block.self_attn.v_proj):
                for parameter in (projection.weight, projection.bias):
                    mean = mean_heads(parameter, 2, HEAD_DIM).unflatten(0, (2, HEAD_DIM))
                    parameter.copy_(mean.repeat_interleave(2, 0).flatten(0, 1))
    model = load_and_shard_model("auto", tmp_path / "c")
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)


def test_of_channels_with_equal_norms_the_first_are_kept(tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path, layers=1, shards=1)
    file = parent / "model.safetensors"
    tensors = load_file(file)
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"].fill_(1)
    tensors["model.layers.0.mlp.down_proj.weight"][:, 90] = 2
    save_file(tensors, file, metadata={"format": "pt"})
    init_child_from_parent(parent, [BlockConfig(ffn=FFNConfig(3))], tmp_path / "c")
    found = tensors_of(tmp_path / "c")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(found, tensors["model.layers.0.mlp.down_proj.weight"][:, [0, 1, 90]])


def test_a_cast_rounds_once(shared: Path, tmp_path: Path) -> None:
    parent = parent_of(shared)
    options: dict[str, Any] = {"ffn_channels": CHANNELS, "kv_heads": KEPT, "dtype": torch.bfloat16}
    init_child_from_parent(parent, CHILD, tmp_path / "c", **options)
    expected = {name: t.to(torch.bfloat16) for name, t in expected_child(tensors_of(parent)).items()}
    assert_equal(tensors_of(tmp_path / "c"), expected)
    assert json.loads((tmp_path / "c/config.json").read_text())["dtype"] == "bfloat16"


def test_the_config_is_the_parents_with_the_childs_blocks(shared: Path, tmp_path: Path) -> None:
    parent = parent_of(shared)
    init_child_from_parent(parent, CHILD, tmp_path / "c")
    config = json.loads((tmp_path / "c/config.json").read_text())
    assert blocks_said(config, "ffn", "intermediate_size") == [96, 40, 40, None, 95, 1, None, None]
    assert blocks_said(config, "attention", "num_key_value_heads") == [4, 2, 2, 1, None, None, 1, None]
    assert blocks_said(config, "attention", "replace_with_linear") == [False] * 5 + [True, False, False]
    assert config["block_configs"][1] == {
        "attention": {
            **{"llama4": None, "mamba": None, "no_op": False, "num_key_value_heads": 2},
            **{"replace_with_linear": False, "sparsify": None, "weights_precision": "bf16"},
        },
        "ffn": {
            **{"intermediate_size": 40, "moe": None, "no_op": False, "replace_with_linear": False},
            **{"sparsify": None, "weights_precision": "bf16"},
        },
        "parallel_blocks": None,
    }
    del config["block_configs"]
    assert config == json.loads((parent / "config.json").read_text())


@pytest.mark.parametrize("dialect", ["per-layer", "megatron"])
def test_another_dialect_may_be_asked_for(shared: Path, tmp_path: Path, dialect: str) -> None:
    blocks = {1: BlockConfig(AttentionConfig(2), FFNConfig(40)), 4: BlockConfig(AttentionConfig(no_op=True))}
    init_child_from_parent(parent_of(shared), blocks, tmp_path / "c", dialect=dialect)
    assert "block_configs" not in json.loads((tmp_path / "c/config.json").read_text())
    assert load_and_shard_model("auto", tmp_path / "c")(IDS).logits.isfinite().all()


def test_a_decilm_parent_has_decilm_children_or_native_ones(shared: Path, tmp_path: Path) -> None:
    parent = heterogeneous_checkpoint(shared, dialect="nemotron_nas", dtype=torch.bfloat16)
    blocks = {6: BlockConfig(ffn=FFNConfig(512))}
    init_child_from_parent(parent, blocks, tmp_path / "deci")
    init_child_from_parent(parent, blocks, tmp_path / "native", dialect="anymodel")
    had, deci, native = (
        json.loads((folder / "config.json").read_text())
        for folder in (parent, tmp_path / "deci", tmp_path / "native")
    )
    assert deci.pop("block_configs")[:6] == had.pop("block_configs")[:6]
    assert deci == had
    assert (native["model_type"], native["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert blocks_said(native, "ffn", "intermediate_size") == [256, 512, None, 256, None, None, 512]
    assert_equal(tensors_of(tmp_path / "deci"), tensors_of(tmp_path / "native"))
    models = [load_and_shard_model("auto", tmp_path / name) for name in ("deci", "native")]
    assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)
    assert load_model_config(tmp_path / "native").intermediate_size == 768


def test_what_is_no_weight_is_carried_over(shared: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(parent_of(shared), parent)
    for name in ("tokenizer.json", "LICENSE", "README.md", "other.bin"):
        (parent / name).write_text(name)
    init_child_from_parent(parent, CHILD, tmp_path / "c", max_shard_size="20KB")
    names = {path.name for path in (tmp_path / "c").iterdir() if path.suffix != ".safetensors"}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "LICENSE"),
    }
    assert (tmp_path / "c/LICENSE").read_text() == "LICENSE"
    model = load_and_shard_model("auto", tmp_path / "c")
    assert model.generation_config.eos_token_id == [2, 3]
    assert len(list((tmp_path / "c").glob("model-*-of-*.safetensors"))) > 3


def test_a_backbone_without_head_has_children_too(shared: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(parent_of(shared, tied=True, shards=1), parent)
    tensors = {k.removeprefix("model."): t for k, t in load_file(parent / "model.safetensors").items()}
    save_file(tensors, parent / "model.safetensors", metadata={"format": "pt"})
    blocks = {2: BlockConfig(AttentionConfig(replace_with_linear=True), FFNConfig(8))}
    init_child_from_parent(parent, blocks, tmp_path / "c")
    found = tensors_of(tmp_path / "c")
    assert found["layers.2.mlp.down_proj.weight"].shape == (64, 8)
    assert found["layers.2.self_attn.linear_attn.weight"].shape == (64, 64)
    assert load_and_shard_model("auto", tmp_path / "c")(IDS).logits.isfinite().all()


@pytest.mark.parametrize("world_size", [2, 3, 13])
def test_ranks_make_the_same_child_together(shared: Path, tmp_path: Path, world_size: int) -> None:
    parent = parent_of(shared, "qwen3", dtype=torch.bfloat16)
    options: dict[str, Any] = {"ffn_channels": CHANNELS, "kv_heads": KEPT}

    def work(rank: ThreadRank) -> Any:
        last = rank.rank == world_size - 1
        where = (rank.rank, world_size, rank.rank == 0, last, None)
        runtime = Runtime(torch.device("cpu"), None, *where, control=rank)
        return init_child_from_parent(parent, CHILD, tmp_path / "many", runtime=runtime, **options)

    reports = run_ranks(world_size, work)
    init_child_from_parent(parent, CHILD, tmp_path / "one", **options)
    assert_equal(tensors_of(tmp_path / "many"), tensors_of(tmp_path / "one"))
    assert {report.nbytes for report in reports} == {
        sum(t.nbytes for t in tensors_of(tmp_path / "one").values())
    }
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def _make_on_rank(parent: Path, out: Path) -> int:
    blocks = [BlockConfig(AttentionConfig(1), FFNConfig(33))] * len(CHILD)
    return init_child_from_parent(parent, blocks, out).nbytes


def test_gloo_ranks_find_each_other(shared: Path, tmp_path: Path, gloo: Gloo) -> None:
    parent = parent_of(shared)
    sizes = gloo.run_ok(_make_on_rank, parent, tmp_path / "many", world_size=2)
    assert sizes == [_make_on_rank(parent, tmp_path / "one")] * 2
    assert_equal(tensors_of(tmp_path / "many"), tensors_of(tmp_path / "one"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 2


def test_a_failure_leaves_nothing_and_reaches_all_ranks(shared: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(parent_of(shared, shards=1), parent)
    tensors = load_file(parent / "model.safetensors")
    tensors["model.layers.6.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, parent / "model.safetensors", metadata={"format": "pt"})
    blocks = [BlockConfig(ffn=FFNConfig(8))] * 8
    text = r"cannot be chosen by norm.*a NaN or an infinity in model\.layers\.6\.mlp\.down_proj"
    with pytest.raises(CheckpointError, match=text):
        init_child_from_parent(parent, blocks, tmp_path / "c")

    def work(rank: ThreadRank) -> Any:
        runtime = Runtime(
            torch.device("cpu"), None, rank.rank, 2, rank.rank == 0, rank.rank == 1, control=rank
        )
        return init_child_from_parent(parent, blocks, tmp_path / "c", runtime=runtime)

    errors = run_ranks(2, work)
    assert all(isinstance(error, CollectiveError) and list(error.failures) == [1] for error in errors), errors
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_ranks_that_disagree_about_the_child_are_told(shared: Path, tmp_path: Path) -> None:
    parent = parent_of(shared)

    def work(rank: ThreadRank) -> Any:
        runtime = Runtime(
            torch.device("cpu"), None, rank.rank, 2, rank.rank == 0, rank.rank == 1, control=rank
        )
        blocks = {0: BlockConfig(ffn=FFNConfig(8))}
        kept = {0: Indexes(range(rank.rank, 8 + rank.rank))}
        return init_child_from_parent(parent, blocks, tmp_path / "c", runtime=runtime, ffn_channels=kept)

    errors = run_ranks(2, work)
    assert all("the ranks disagree on `plan`" in str(error) for error in errors), errors
    assert not (tmp_path / "c").exists()


def test_an_overwrite_replaces_the_old_child_or_is_refused(shared: Path, tmp_path: Path) -> None:
    parent = parent_of(shared)
    init_child_from_parent(parent, {1: BlockConfig(ffn=FFNConfig(8))}, tmp_path / "c", max_shard_size="30KB")
    with pytest.raises(CheckpointError, match="there is something already"):
        init_child_from_parent(parent, CHILD, tmp_path / "c", overwrite=False)
    init_child_from_parent(parent, {1: BlockConfig(ffn=FFNConfig(16))}, tmp_path / "c")
    assert tensors_of(tmp_path / "c")["model.layers.1.mlp.up_proj.weight"].shape == (16, 64)
    with pytest.raises(ConfigError, match="is the parent itself; give the child a directory of its own"):
        init_child_from_parent(parent, CHILD, parent)
    with pytest.raises(ConfigError, match="is the parent itself"):
        init_child_from_parent(parent / "model.safetensors.index.json", CHILD, parent)
    with pytest.raises(ConfigError, match="is the parent itself"):
        init_child_from_parent(f"file://{parent}", CHILD, parent)


def test_a_parent_whose_config_contradicts_its_files_is_refused(shared: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(parent_of(shared), parent)
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    text = (
        r"the config says that block 0 is BlockConfig\(.*FFNConfig\(intermediate_size=128\)\), the "
        r"tensors say BlockConfig\(.*intermediate_size=96"
    )
    with pytest.raises(CheckpointError, match=text):
        init_child_from_parent(parent, CHILD, tmp_path / "c")


def test_an_unproven_family_is_refused(tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path, "olmo2", layers=2, shards=1)
    with pytest.raises(
        FamilyError, match=r"family 'olmo2', of which no children can be made so far; supported"
    ):
        init_child_from_parent(parent, [BlockConfig()] * 2, tmp_path / "c")


def test_larger_than_the_parent_is_refused_before_anything_is_written(shared: Path, tmp_path: Path) -> None:
    text = (
        r"block 3: ffn.intermediate_size=97 is more than the parent's 96; a child only leaves out: ask for 96"
    )
    with pytest.raises(BlockConfigError, match=text):
        init_child_from_parent(parent_of(shared), {3: BlockConfig(ffn=FFNConfig(97))}, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_lost_biases_and_silent_children_are_told(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = {i: BlockConfig(AttentionConfig(replace_with_linear=True)) for i in (1, 2)}
    with caplog.at_level(logging.WARNING):
        report = init_child_from_parent(parent_of(shared, "qwen2"), blocks, tmp_path / "c")
    biases = (
        "2 biases have no place in a linear layer and are left out: model.layers.{1-2}.self_attn.v_proj.bias"
    )
    assert biases in report.warnings[0]
    assert "from_pretrained opens this checkpoint without an error" in report.warnings[1]
    assert biases in caplog.text
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{tmp_path / 'c'}: a child of {parent_of(shared, 'qwen2')}, ")
    assert lines[1] == "2 of 8 blocks differ from the parent's: 1-2"


def test_progress_counts_the_bytes_of_the_child(shared: Path, tmp_path: Path) -> None:
    counts: list[int] = []
    report = init_child_from_parent(parent_of(shared), CHILD, tmp_path / "c", progress=counts.append)
    assert sum(counts) == report.nbytes
    assert len(counts) == report.tensors


def test_of_a_url_only_what_the_child_keeps_is_fetched(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec")
    from sharded_ckpt.checkpoint.remote import RemoteSource

    parent = parent_of(shared, "qwen3", shards=1)
    files = fsspec.filesystem("memory")
    files.put(str(parent), "/child-of-url/parent", recursive=True)
    fetched: list[tuple[int, int]] = []
    true_read = RemoteSource.read_bytes

    def read_bytes(self: Any, name: str, begin: int = 0, end: int | None = None) -> bytes:
        if name.endswith(".safetensors") and begin:
            fetched.append((begin, end or 0))
        return true_read(self, name, begin, end)

    monkeypatch.setattr(RemoteSource, "read_bytes", read_bytes)
    blocks = {2: BlockConfig(AttentionConfig(no_op=True), FFNConfig(8))}
    init_child_from_parent("memory://child-of-url/parent", blocks, tmp_path / "far", ffn_channels="first")
    init_child_from_parent(parent, blocks, tmp_path / "near", ffn_channels="first")
    assert_equal(tensors_of(tmp_path / "far"), tensors_of(tmp_path / "near"))
    total = sum(end - begin for begin, end in fetched)
    kept_whole = sum(t.nbytes for name, t in tensors_of(tmp_path / "far").items() if "2.mlp.down" not in name)
    down = tensors_of(parent)["model.layers.2.mlp.down_proj.weight"].nbytes
    assert total == kept_whole + down
