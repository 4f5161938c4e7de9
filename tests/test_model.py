"""What a shard owns is there, what it does not own holds no storage, and nothing pretends to be whole."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compare import assert_same_tensors, storage_of_stubs, tensors_in
from support.tiny import FAMILIES, heterogeneous_checkpoint, tiny_checkpoint, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from patchers.cache_names import cache_name
from patchers.errors import OwnershipError, PartialModelError
from patchers.substitutes import Unowned, UnownedBlock, UnownedEmbedding, armed
from sharded_ckpt import create_local_shard_, create_sharded_model, load_and_shard_model, set_submodule

IDS = torch.arange(10).reshape(1, 10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("owned", [{0}, {1, 2}, {3}, set()])
def test_skeleton_has_what_is_owned_on_meta(family: str, owned: set[int]) -> None:
    model = create_sharded_model(None, family, tiny_config(family), owned)
    assert {t.device.type for t in model.parameters()} <= {"meta"}
    assert {t.dtype for t in model.parameters()} <= {torch.float32}
    assert _blocks_in(model) == owned
    assert isinstance(model.model.embed_tokens, UnownedEmbedding) == (0 not in owned)
    assert isinstance(model.lm_head, Unowned) == isinstance(model.model.norm, Unowned) == (3 not in owned)
    assert [isinstance(layer, UnownedBlock) for layer in model.model.layers] == [
        i not in owned for i in range(4)
    ]


def test_dtype_and_config_are_as_asked() -> None:
    config = tiny_config(dtype=torch.bfloat16)
    before = config.to_dict()
    for asked, made in ((torch.float16, torch.float16), (None, torch.bfloat16)):
        model = create_sharded_model(None, "auto", config, {0}, dtype=asked)
        assert {t.dtype for t in model.parameters()} == {made}
        assert model.config.dtype == made
    assert config.to_dict() == before


def test_on_a_real_device_the_owned_parts_are_newly_initialised() -> None:
    torch.manual_seed(0)
    model = create_sharded_model(None, "llama", tiny_config(tied=True), {0, 1, 2, 3}, device="cpu")
    assert not any(t.is_meta for t in tensors_in(model).values())
    assert 0.01 < model.model.layers[0].mlp.up_proj.weight.std() < 0.03
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    assert model.model.rotary_emb.inv_freq[0] == 1.0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(IDS).logits.isfinite().all()


def test_block_configs_reach_the_skeleton() -> None:
    model = create_sharded_model(
        None,
        "llama",
        tiny_config(),
        {1},
        block_configs=[{"ffn": {"intermediate_size": 8 * (i + 1)}} for i in range(4)],
    )
    assert model.model.layers[1].mlp.up_proj.weight.shape == (16, 64)


@pytest.mark.parametrize("owned", [{4}, {-1}, {0, 99}])
def test_owned_index_out_of_range_is_refused(owned: set[int]) -> None:
    wrong = str(max(owned, key=abs) if 0 in owned else next(iter(owned)))
    with pytest.raises(OwnershipError, match=wrong):
        create_sharded_model(None, "llama", tiny_config(), owned)
    with pytest.raises(OwnershipError, match=wrong):
        create_local_shard_(tiny_model(), owned, "llama")


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_model_is_cut_down_in_place_and_lets_go_of_the_rest(tied: bool) -> None:
    model, reference = tiny_model(tied=tied), tiny_model(tied=tied)
    kept_elsewhere = model.model.layers[0]
    assert create_local_shard_(model, {2, 3}, "llama") is model
    assert_same_tensors(model, reference, partial=True)
    assert storage_of_stubs(model) == 0
    assert _blocks_in(model) == {2, 3}
    assert not kept_elsewhere.mlp.up_proj.weight.is_meta, "a block that is in use elsewhere must stay whole"


def test_cutting_down_twice_is_the_same_as_once() -> None:
    model = create_local_shard_(create_local_shard_(tiny_model(), {1, 2}, "llama"), {1, 2}, "llama")
    assert _blocks_in(model) == {1, 2}
    assert not isinstance(model.model.layers[0].__dict__["_original"], Unowned)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return heterogeneous_checkpoint(tmp_path_factory.mktemp("het"), tied=True)


@pytest.mark.parametrize("owned", [{0, 1, 2}, {3, 4}, {5, 6}, set()])
def test_partial_shard_called_like_a_model_says_what_to_use(folder: Path, owned: set[int]) -> None:
    shard = load_and_shard_model("auto", folder, owned)
    for call in (lambda: shard(IDS), lambda: shard.model(IDS), lambda: shard.generate(IDS, max_new_tokens=2)):
        with pytest.raises(
            PartialModelError, match=r"does not own .*Run it as a stage.*load the whole model"
        ):
            call()


def test_partial_shard_refuses_save_pretrained_and_says_what_to_use(folder: Path, tmp_path: Path) -> None:
    shard = load_and_shard_model("auto", folder, {0, 1})
    for twin in (shard, copy.deepcopy(shard), pickle.loads(pickle.dumps(shard))):
        with pytest.raises(PartialModelError, match=r"save_sharded_model\(model_shard"):
            twin.save_pretrained(tmp_path / "half")
        assert not (tmp_path / "half").exists()


def test_partial_shard_copies_moves_and_changes_dtype(folder: Path) -> None:
    shard = load_and_shard_model("auto", folder, {5, 6})
    assert_same_tensors(copy.deepcopy(shard), shard)
    assert_same_tensors(pickle.loads(pickle.dumps(shard)), shard)
    half = copy.deepcopy(shard).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert storage_of_stubs(half) == 0


@pytest.mark.parametrize("owned", [{1, 2}, {5, 6}])
def test_armed_shard_counts_tokens_in_every_layer(folder: Path, owned: set[int]) -> None:
    shard = load_and_shard_model("auto", folder, owned)
    cache = DynamicCache(config=shard.config)
    with armed(shard), torch.no_grad():
        shard(IDS, **{cache_name(shard.forward): cache})
    assert {cache.get_seq_length(layer) for layer in range(7)} == {10}


def whole_models() -> list[Any]:
    return [pytest.param(kind, id=kind) for kind in ("plain", "anymodel", "nemotron_nas")]


@pytest.fixture(params=whole_models())
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "plain":
        return load_and_shard_model("auto", tiny_checkpoint(tmp_path, tied=True))
    return load_and_shard_model("auto", heterogeneous_checkpoint(tmp_path, dialect=request.param))


def test_whole_model_saves_itself_in_a_form_that_is_read_back(whole: Any, tmp_path: Path) -> None:
    whole.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    again = load_and_shard_model("auto", tmp_path / "saved")
    assert_same_tensors(again, whole)
    assert again.generation_config.to_dict() == whole.generation_config.to_dict()
    assert torch.equal(again(IDS).logits, whole(IDS).logits)


def test_whole_model_copies_and_pickles(whole: Any) -> None:
    expected = whole(IDS).logits
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert_same_tensors(twin, whole)
        assert torch.equal(twin(IDS).logits, expected)
        assert twin.load_report == whole.load_report


def test_whole_model_changes_dtype(whole: Any) -> None:
    half = whole.to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert (
        half.model.rotary_emb.inv_freq.dtype is torch.bfloat16
    )  # as in transformers: an explicit cast casts all
    assert half(IDS).logits.isfinite().all()


def test_whole_model_generates(whole: Any) -> None:
    tokens = whole.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert tokens.shape == (1, 14)
    beams = whole.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, num_beams=2, do_sample=False
    )
    assert beams.shape[1] <= 13


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)  # peft's own call
def test_whole_model_trains_with_peft(whole: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    base = copy.deepcopy(whole)
    adapted = get_peft_model(
        whole, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    adapted.train()(IDS, labels=IDS).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, adapted(IDS).logits)


def test_block_can_be_swapped_by_dotted_path(whole: Any) -> None:
    replacement = nn.Identity()
    set_submodule(whole, "model.layers.0.mlp", replacement)
    assert whole.model.layers[0].mlp is replacement


def test_plain_whole_model_opens_in_plain_transformers(tmp_path: Path) -> None:
    model = load_and_shard_model("auto", tiny_checkpoint(tmp_path, "qwen3"))
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)


def _blocks_in(model: Any) -> set[int]:
    return {
        int(name.split(".")[2]) for name, _ in model.named_parameters() if name.startswith("model.layers.")
    }
