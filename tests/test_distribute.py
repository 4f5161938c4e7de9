from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.gloo import Gloo, RankFailure
from torch import nn

from patchers.errors import CheckpointError, CollectiveError, ConfigError, MissingKeysError
from sharded_ckpt.checkpoint.raw import bytes_of
from sharded_ckpt.collective.control_group import chunks
from sharded_ckpt.distribute.distribution import Held, RankTable, Slot, global_name, plan_distribution
from sharded_ckpt.distribute.verbs import load_state_dict_to_shards
from sharded_ckpt.ownership.plan import check_ownership
from sharded_ckpt.runtime import default_runtime

WIDTHS = (4, 6, 0, 8)


class Block(nn.Module):
    """A block with tensors of several kinds; the third one has no FFN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Linear(6, 6, bias=False)
        self.ffn = nn.Linear(6, width) if width else nn.Identity()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.ones(3), persistent=False)


class Decoder(nn.Module):
    """A decoder shaped like native ones, as plain as can be."""

    _tied_weights_keys = {"head.weight": "embed.weight"}

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=tied)
        self.embed = nn.Embedding(10, 6)
        self.layers = nn.ModuleList(Block(width) for width in WIDTHS)
        self.head = nn.Linear(6, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def shard_of(owned: set[int], tied: bool = False, device: str = "meta") -> Decoder:
    """What a rank has: stubs without storage in the place of what it does not own."""
    check_ownership(owned, len(WIDTHS))
    with torch.device(device):
        model = Decoder(tied)
    for index in set(range(len(WIDTHS))) - owned:
        model.layers[index] = nn.Identity()
    if 0 not in owned:
        model.embed = nn.Identity()
    if len(WIDTHS) - 1 not in owned:
        model.head = nn.Identity()
    return model


def whole_state(tied: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model = Decoder(tied)
    for index, block in enumerate(model.layers):
        block.steps.fill_(2**53 + 1 + index)  # no float holds it
    state = {key: value.detach() for key, value in model.state_dict().items()}
    if tied:
        del state["head.weight"]
    return state


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def owned_by(plan: list[set[int]]) -> set[int]:
    return plan[rank()]


def check_shard(model: nn.Module, state: dict[str, torch.Tensor], tied: bool = False) -> None:
    """Every owned tensor is bit-equal and where it should be."""
    for name, tensor in model.state_dict().items():
        wanted = state["embed.weight" if tied and name == "head.weight" else name]
        assert tensor.dtype == wanted.dtype, name
        assert tensor.device.type == "cpu", name
        assert tensor.shape == wanted.shape, name
        assert torch.equal(bytes_of(tensor.contiguous()), bytes_of(wanted.contiguous())), name
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())


# What ranks run -------------------------------------------------------------------------------------------


def distribute(plan: list[set[int]], tied: bool, chunk_bytes: int) -> tuple[list[str], list[int]]:
    state = whole_state(tied)
    model = shard_of(owned_by(plan), tied)
    sent: list[int] = []
    given = state if rank() == 0 else None
    load_state_dict_to_shards(
        model, given, runtime=default_runtime(device="cpu"), chunk_bytes=chunk_bytes, sent=sent.append
    )
    check_shard(model, state, tied)
    if tied and {0, 3} <= owned_by(plan):
        assert model.head.weight is model.embed.weight
    return sorted(model.state_dict()), sent


def distribute_with(change: str) -> None:
    """Two ranks, two blocks each, and something is wrong."""
    state, model = whole_state(), shard_of([{0, 1}, {2, 3}][rank()])
    given: Any = state if rank() == 0 else None
    if change == "nobody":
        given = None
    elif change == "wrong rank":
        given = state if rank() == 1 else None
    elif change == "everybody":
        given = state
    elif change == "missing":
        del state["layers.2.attention.weight"], state["layers.3.attention.weight"], state["embed.weight"]
    elif change == "extra":
        state.update(
            {"layers.4.attention.weight": torch.zeros(2), "layers.5.attention.weight": torch.zeros(2)}
        )
    elif change == "unowned" and rank() == 1:
        model.layers[2] = nn.Identity()
    elif change == "shape":
        state["layers.3.ffn.weight"] = torch.zeros(5, 6)
    elif change == "kind":
        state["layers.3.ffn.weight"] = torch.zeros(8, 6, dtype=torch.int8)
    elif change == "no tensor" and rank() == 0:
        state["layers.3.ffn.weight"] = [1.0]  # type: ignore[assignment]
    options: dict[str, Any] = {"chunk_bytes": 64 + rank()} if change == "chunks" else {}
    options |= {"dtype": torch.int8} if change == "dtype" else {}
    load_state_dict_to_shards(model, given, runtime=default_runtime(device="cpu", timeout=20), **options)


def distribute_native(tied: bool) -> tuple[list[str], list[str]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from sharded_ckpt.model import create_sharded_model

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    config = LlamaConfig(num_hidden_layers=3, tie_word_embeddings=tied, **sizes)
    torch.manual_seed(7)
    whole = LlamaForCausalLM(config)
    state = whole.state_dict()
    if tied:
        del state["lm_head.weight"]
    runtime = default_runtime(device="cpu")
    model = create_sharded_model(runtime, "auto", config, [{0, 1}, {2}][rank()])
    load_state_dict_to_shards(model, state if rank() == 0 else None, runtime=runtime)
    check_shard(model, whole.state_dict())
    buffers = dict(whole.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    return sorted(name for name in model.state_dict() if "layers" not in name), sorted(buffers)


class DyingBlock(Block):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "steps":
            os.kill(os.getpid(), signal.SIGKILL)
        super().__setattr__(name, value)


def distribute_and_die(dying: int) -> None:
    state, model = whole_state(), shard_of([{0, 1}, {2}, {3}][rank()])
    if rank() == dying:
        model.layers[3].__class__ = DyingBlock
    given = state if rank() == 0 else None
    load_state_dict_to_shards(model, given, runtime=default_runtime(device="cpu", timeout=2))


def distribute_much(megabytes: int, chunk_bytes: int) -> tuple[int, int]:
    """Return by how many bytes the peak memory of this rank rises, and how many it owns."""
    model = nn.ModuleList(nn.Linear(1024, 256 * megabytes // 8, bias=False, device="meta") for _ in range(8))
    state = None
    if rank() == 0:
        state = {key: torch.ones(value.shape) for key, value in model.state_dict().items()}
        for index in range(8):
            model[index] = nn.Identity()
    runtime = default_runtime(device="cpu")
    runtime.control.connect()  # type: ignore[attr-defined]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = memory("VmRSS")
    load_state_dict_to_shards(model, state, runtime=runtime, chunk_bytes=chunk_bytes)
    owned = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return memory("VmHWM") - before, owned


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# Several ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "plan",
    [
        [{0, 1, 2, 3}],
        [{0, 1}, {2, 3}],
        [{0, 3}, {1, 2}],
        [{3}, {1}, {0, 2}],
        [{0}, {1, 2}, set(), {3}],
    ],
    ids=str,
)
def test_each_rank_gets_its_tensors_bit_for_bit(gloo: Gloo, plan: list[set[int]], tied: bool) -> None:
    results = gloo.run_ok(distribute, plan, tied, 2**20, world_size=len(plan))
    everything = set(whole_state(tied)) | {"head.weight"}
    assert set().union(*(keys for keys, _ in results)) == everything


def test_only_what_a_rank_owns_is_sent_one_chunk_at_a_time(gloo: Gloo) -> None:
    plan = [{0, 1}, {2}, {3}]
    sent = gloo.run_ok(distribute, plan, False, 64, world_size=3)[0][1]
    state = whole_state()
    theirs = [key for key in state if key.startswith(("layers.2.", "layers.3.", "head."))]
    assert sum(sent) == sum(state[key].numel() * state[key].element_size() for key in theirs)
    assert max(sent) <= 64
    assert len(sent) > 10


def test_memory_holds_one_chunk_more_and_no_pickle(gloo: Gloo) -> None:
    chunk = 4 * 2**20
    (sender, _), (receiver, owned) = gloo.run_ok(distribute_much, 128, chunk)
    slack = 8 * 2**20  # buffers of sockets, modules imported on the way
    assert owned == 128 * 2**20
    assert sender < chunk + slack
    assert receiver < owned + chunk + slack


def test_tensors_beyond_two_gigabytes_travel_in_chunks() -> None:
    huge = torch.empty(3, 2**30, dtype=torch.uint8, device="meta")
    sizes = [chunk.numel() for chunk in chunks(huge, 64 * 2**20)]
    assert max(sizes) <= 64 * 2**20
    assert sum(sizes) == 3 * 2**30


@pytest.mark.parametrize("tied", [False, True])
def test_native_models_are_complete_afterwards(gloo: Gloo, tied: bool) -> None:
    (first, buffers), (last, _) = gloo.run_ok(distribute_native, tied)
    assert first == ["model.embed_tokens.weight"]
    assert last == ["lm_head.weight", "model.norm.weight"]
    assert "model.rotary_emb.inv_freq" in buffers


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (
            "nobody",
            ConfigError,
            "rank 0, and rank 0 alone, must be given the state dict; no rank was given one",
        ),
        (
            "wrong rank",
            ConfigError,
            "rank 0, and rank 0 alone, must be given the state dict; rank 1 of 2 was given one",
        ),
        (
            "everybody",
            ConfigError,
            "rank 0, and rank 0 alone, must be given the state dict; rank 0-1 of 2 was given one",
        ),
        (
            "missing",
            MissingKeysError,
            "the state dict lacks 3 tensors: rank 0 owns embed.weight; "
            "rank 1 owns layers.{2-3}.attention.weight. "
            "Does it come from another model, or from a part of this one?",
        ),
        (
            "extra",
            CheckpointError,
            "the state dict has 2 tensors that no shard owns: layers.{4-5}.attention.weight. "
            "Pass strict=False to leave them out",
        ),
        (
            "unowned",
            CheckpointError,
            "the state dict has 2 tensors that no shard owns: layers.2.attention.weight, layers.2.steps. "
            "Pass strict=False to leave them out",
        ),
        (
            "shape",
            CheckpointError,
            "1 tensors of the state dict do not fit: layers.3.ffn.weight has shape (5, 6), "
            "the shard of rank 1 wants (8, 6). The model may be built from other block configs: "
            "patchers.infer_block_configs reads them off tensor shapes",
        ),
        (
            "chunks",
            ConfigError,
            "cannot hand out the state dict: the ranks disagree on `chunk_bytes`: 64 on rank 0; 65 on rank 1",
        ),
        (
            "dtype",
            CollectiveError,
            "comparing the state dict with the shards failed on all 2 ranks: ConfigError: dtype=torch.int8: "
            "expected a floating-point one, such as torch.bfloat16",
        ),
        (
            "kind",
            CheckpointError,
            "1 tensors of the state dict do not fit: layers.3.ffn.weight is int8, the shard of rank 1 wants "
            "floating-point numbers. The model may be built from other block configs: "
            "patchers.infer_block_configs reads them off tensor shapes",
        ),
    ],
)
def test_what_is_wrong_is_the_same_error_on_all_ranks(
    gloo: Gloo, change: str, kind: type[Exception], text: str
) -> None:
    results = gloo.run(distribute_with, change)
    assert [failure.text for failure in results] == [text, text]
    assert [type(failure.error) for failure in results] == [kind, kind]


def test_a_failure_of_one_rank_is_raised_by_all(gloo: Gloo) -> None:
    results = gloo.run(distribute_with, "no tensor")
    text = (
        "comparing the state dict with the shards failed on rank 0 of 2: CheckpointError: "
        "layers.3.ffn.weight of the state dict is a list, not a plain tensor; rank 1 was well"
    )
    assert [failure.text for failure in results] == [text, text]
    assert results[0].cause.startswith("CheckpointError: layers.3.ffn.weight")


def test_a_rank_that_dies_while_receiving_is_named(gloo: Gloo) -> None:
    first, second, died = gloo.run(distribute_and_die, 2, world_size=3, lost=[2])
    assert isinstance(died, RankFailure)
    assert died.kind == "died"
    assert first.type == second.type == "CollectiveError"
    assert first.text == second.text
    assert first.text.startswith(
        "handing out the state dict failed on rank 2 of 3: no sign of life for 1.5 s"
    )


# One process ----------------------------------------------------------------------------------------------


def load(model: nn.Module, state: Any, **options: Any) -> nn.Module:
    load_state_dict_to_shards(model, state, runtime=default_runtime(device="cpu"), **options)
    return model


def test_one_process_needs_no_process_group_and_copies_nothing() -> None:
    state = whole_state()
    model = load(shard_of({0, 1, 2, 3}), state)
    check_shard(model, state)
    assert model.embed.weight.data_ptr() == state["embed.weight"].data_ptr()
    assert model.embed.weight.requires_grad


def test_what_the_shard_holds_already_is_replaced_and_keeps_its_gradient_flag() -> None:
    model = shard_of({0, 1, 2, 3}, device="cpu")
    model.embed.weight.requires_grad_(False)
    before = model.layers[0].table
    check_shard(load(model, whole_state()), whole_state())
    assert not model.embed.weight.requires_grad
    assert model.head.weight.requires_grad
    assert model.layers[0].table is before


def test_dtypes_stay_unless_asked_and_integers_always() -> None:
    state = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in whole_state().items()
    }
    state["embed.weight"] = state["embed.weight"].to(torch.float8_e4m3fn)
    check_shard(load(shard_of({0, 1, 2, 3}), state), state)
    del state["embed.weight"]
    asked = load(shard_of({1, 2, 3}), state, dtype=torch.float16, strict=False)
    assert asked.head.weight.dtype == torch.float16
    assert asked.layers[1].steps.dtype == torch.int64
    assert asked.layers[1].steps.item() == 2**53 + 2


def test_quantised_numbers_are_not_cast_blindly() -> None:
    state = whole_state()
    state["embed.weight"] = state["embed.weight"].to(torch.float8_e4m3fn)
    text = "embed.weight is float8_e4m3fn, which is quantised and not cast blindly to bfloat16"
    with pytest.raises(CheckpointError, match=text):
        load(shard_of({0, 1, 2, 3}), state, dtype=torch.bfloat16)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_wrappers_changed_are_understood_on_both_sides(prefix: str) -> None:
    state = whole_state()
    check_shard(load(shard_of({0, 1, 2, 3}), {prefix + key: value for key, value in state.items()}), state)
    wrapped = nn.Module()
    wrapped.module = shard_of({0, 1, 2, 3}, tied=True)
    load(wrapped, whole_state(tied=True))
    check_shard(wrapped.module, whole_state(tied=True), tied=True)
    assert global_name("a.module.b") == "a.module.b"
    assert global_name("a._orig_mod.b._fsdp_wrapped_module.c") == "a.b.c"


def test_two_names_for_one_tensor_are_refused() -> None:
    state = whole_state() | {"module.embed.weight": torch.zeros(10, 6)}
    text = "the state dict has several tensors of one name: embed.weight, module.embed.weight; remove all but"
    with pytest.raises(CheckpointError, match=text):
        load(shard_of({0, 1, 2, 3}), state)


def test_a_name_that_is_no_string_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match="the state dict has a tensor named 7; names of tensors are str"
    ):
        load(shard_of({0, 1, 2, 3}), {**whole_state(), 7: torch.zeros(1)})


@pytest.mark.parametrize("present", ["embed.weight", "head.weight"])
def test_either_end_feeds_a_tied_model(present: str) -> None:
    state = whole_state(tied=True)
    state[present] = state.pop("embed.weight")
    model = load(shard_of({0, 1, 2, 3}, tied=True), state)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, state[present])
    head = load(shard_of({3}, tied=True), state, strict=False)
    assert torch.equal(head.head.weight, state[present])


def test_ties_are_those_of_class_and_config_unless_given() -> None:
    state = whole_state(tied=True)
    with pytest.raises(MissingKeysError, match=r"lacks 1 tensors: rank 0 owns head\.weight"):
        load(shard_of({3}), state, strict=False)
    model = load(shard_of({0, 1, 2, 3}), state, ties={"head.weight": "embed.weight"})
    assert torch.equal(model.head.weight, model.embed.weight)
    assert model.head.weight.data_ptr() != model.embed.weight.data_ptr()  # two parameters, so two memories


def test_tied_tensors_that_differ_are_refused() -> None:
    state = whole_state(tied=True)
    state["head.weight"] = state["embed.weight"].clone()
    state["head.weight"][0, 0] = state["embed.weight"][0, 0] = float("nan")
    load(shard_of({0, 1, 2, 3}, tied=True), state)
    state["head.weight"][1, 1] += 1
    text = "embed.weight and head.weight are one parameter in the model, but differ in the state dict; untie"
    with pytest.raises(CheckpointError, match=text):
        load(shard_of({0, 1, 2, 3}, tied=True), state)


def test_left_over_tensors_are_logged_when_that_is_allowed(caplog: pytest.LogCaptureFixture) -> None:
    state = whole_state() | {"extra.weight": torch.zeros(2)}
    del state["layers.1.attention.weight"]
    model = shard_of({0, 1, 2, 3}, device="cpu")
    kept = model.layers[1].attention.weight
    with caplog.at_level(logging.WARNING):
        load(model, state, strict=False)
    assert model.layers[1].attention.weight is kept
    assert [record.getMessage() for record in caplog.records] == [
        "no shard owns extra.weight of the state dict; left out",
        "the state dict lacks layers.1.attention.weight; rank 0 keeps its own",
    ]
    with pytest.raises(MissingKeysError, match=r"It has 1 that no shard owns: extra\.weight"):
        load(shard_of({0, 1, 2, 3}), state, strict=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.0, "embed.weight of the state dict is a float, not a plain tensor"),
        (
            torch.zeros(10, 6, device="meta"),
            "is on meta, without numbers; only plain tensors can be handed out",
        ),
        (torch.zeros(10, 6).to_sparse(), "is sparse or quantised by torch; only plain tensors"),
    ],
    ids=["float", "meta", "sparse"],
)
def test_only_plain_tensors_are_handed_out(value: Any, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        load(shard_of({0, 1, 2, 3}), whole_state() | {"embed.weight": value})


def test_odd_layouts_arrive_in_order() -> None:
    state = whole_state()
    state["embed.weight"] = state["embed.weight"].T.contiguous().T
    state["head.weight"] = torch.tensor(2.0).expand(10, 6)
    model = load(shard_of({0, 1, 2, 3}), state)
    check_shard(model, state)
    assert model.head.weight.is_contiguous()
    assert model.embed.weight.is_contiguous()


def test_a_runtime_without_a_process_group_says_so() -> None:
    runtime = SimpleNamespace(
        device="cpu", dtype=None, global_rank=0, world_size=2, is_main_process=True, is_last_process=False
    )
    with pytest.raises(
        ConfigError, match=r"needs all 2 processes of the runtime, but torch\.distributed is not"
    ):
        load_state_dict_to_shards(shard_of({0}), whole_state(), runtime=runtime)
    with pytest.raises(ConfigError, match="loaded_state_dict is a list; it must be a mapping of tensors"):
        load(shard_of({0}), [1])


# The plan -------------------------------------------------------------------------------------------------


def slot(*names: str, **changes: Any) -> Slot:
    return Slot(names, **({"partners": (), "shape": (2,), "floating": True, "filled": False} | changes))


def test_a_plan_survives_json() -> None:
    import json

    table = RankTable(
        (slot("a", "b", partners=("c",)),), True, {"a": Held((2,), "bfloat16", True)}, "float32"
    )
    assert RankTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_several_shards_may_own_the_same_tensor() -> None:
    held = {"a": Held((2,), "float32", True)}
    tables = [RankTable((slot("a"),), True, held, None), RankTable((slot("a"),), False, {}, None)]
    assert plan_distribution(tables).keys == (("a",), ("a",))


def test_many_tensors_are_planned_at_once() -> None:
    import time

    held = {f"layers.{i}.w": Held((2,), "float32", True) for i in range(20_000)}
    tables = [RankTable(tuple(map(slot, held)), True, held, None)]
    began = time.monotonic()
    assert len(plan_distribution(tables).keys[0]) == 20_000
    assert time.monotonic() - began < 5
