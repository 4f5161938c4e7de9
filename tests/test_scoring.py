"""Scores over ranks are those of the whole model, and what pruning takes of them is what it claims to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import family_model
from support.gloo import Gloo, RankFailure
from support.scoring_ranks import (
    scores_after_a_break,
    scores_beside_teacher,
    scores_of,
    scores_with_other_teacher,
)
from support.tiny import BLOCKS, heterogeneous_checkpoint, tiny_checkpoint
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from patchers import BlockConfig, FFNConfig
from patchers.errors import CheckpointError, ConfigError
from sharded_ckpt import PipelineStage, load_and_shard_model
from sharded_ckpt.children import init_child_from_parent
from sharded_ckpt.pipeline.scoring import ScoreResult

Batch = dict[str, torch.Tensor]


def data(batches: int = 3, rows: int = 4, tokens: int = 9) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 128, (batches, rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 1, :3] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scoring")


def whole(checkpoint: Path) -> PreTrainedModel:
    return load_and_shard_model("auto", checkpoint, dtype=torch.float32)


def log_probs_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    found = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    mask = batch["attention_mask"]
    return found.masked_fill((mask[:, 1:] & mask[:, :-1]) == 0, torch.nan)


@pytest.mark.parametrize(
    ("world_size", "owned", "micro_batches"),
    [(1, None, 2), (2, None, 1), (3, [[0, 1], [], [2, 3, 4, 5, 6]], [3, 1])],
)
def test_scores_are_those_of_the_whole_model(
    gloo: Gloo, folder: Path, world_size: int, owned: Any, micro_batches: Any
) -> None:
    checkpoint = heterogeneous_checkpoint(folder)
    options = {"owned": owned, "micro_batches": micro_batches}
    ranks: list[ScoreResult] = gloo.run_ok(_scored, checkpoint, data(), options, world_size=world_size)
    expected = torch.cat([log_probs_of(whole(checkpoint), batch) for batch in data()])
    counted = expected[~expected.isnan()]
    for rank in ranks:
        assert rank.tokens == counted.numel() == 3 * (3 * 8 + 5)
        assert rank.loss == pytest.approx(-counted.mean().item(), rel=1e-5)
        assert rank.perplexity == pytest.approx(torch.exp(-counted.mean()).item(), rel=1e-4)
    found = torch.stack(ranks[-1].log_probs or ())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert all(rank.log_probs is None for rank in ranks[:-1])


def _scored(checkpoint: Path, dataset: list[Batch], options: dict[str, Any]) -> ScoreResult:
    return scores_of(checkpoint, dataset, **options)


def test_padding_on_the_left_changes_no_score(folder: Path) -> None:
    stage = PipelineStage(whole(tiny_checkpoint(folder)))
    (batch,) = data(1)
    short = stage.score([{"input_ids": batch["input_ids"][1:2, 3:]}])
    padded = stage.score([{name: tensor[1:2] for name, tensor in batch.items()}])
    assert short.tokens == padded.tokens == 5
    assert padded.loss == pytest.approx(short.loss, rel=1e-5)


def test_labels_say_what_counts(folder: Path) -> None:
    (batch,) = data(1)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[2, 4] = 17
    model = whole(tiny_checkpoint(folder))
    result = PipelineStage(model).score([{**batch, "labels": labels}])
    with torch.no_grad():
        logits = model(**batch).logits
    assert result.tokens == 1
    assert result.loss == pytest.approx(-logits[2, 3].log_softmax(-1)[17].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "options", "text"),
    [
        ({"labels": torch.zeros(3, 9)}, {}, r"labels \(3, 9\) must be as large as input_ids \(4, 9\)"),
        ({"labels": torch.zeros(4, 8)}, {}, r"labels \(4, 8\) must be as large as input_ids \(4, 9\)"),
        ({"attention_mask": torch.zeros(4, 1, 9, 9)}, {}, r"attention_mask \(4, 1, 9, 9\) must be as large"),
        (
            {"attention_mask": torch.zeros(4, 1, 9, 9), "labels": torch.zeros(4, 9)},
            {"activations": True},
            r"attention_mask \(4, 1, 9, 9\) must be as large",
        ),
    ],
)
def test_what_does_not_say_of_each_token_whether_it_counts_is_refused(
    folder: Path, given: Batch, options: dict[str, Any], text: str
) -> None:
    stage = PipelineStage(whole(tiny_checkpoint(folder)))
    with pytest.raises(ConfigError, match=text):
        stage.score([{**data(1)[0], **given}], **options)


# A teacher ------------------------------------------------------------------------------------------------


def test_a_child_is_compared_with_its_teacher_block_by_block(gloo: Gloo, folder: Path) -> None:
    teacher = tiny_checkpoint(folder, layers=4)
    child = folder / "child"
    if not child.exists():
        init_child_from_parent(teacher, {2: BlockConfig(ffn=FFNConfig(48))}, child, progress=False)
    ranks = gloo.run_ok(scores_beside_teacher, child, teacher, data(), [[0, 1], [2, 3]])
    divergence, cosines = compared(whole(child), whole(teacher))
    for rank in ranks:
        assert rank.kl == pytest.approx(divergence, rel=1e-4)
        assert rank.cosine == pytest.approx(cosines, rel=1e-5)
    assert cosines[1] == pytest.approx(1, abs=1e-6)
    assert cosines[3] < 0.999


def compared(model: PreTrainedModel, teacher: PreTrainedModel) -> tuple[float, dict[int, float]]:
    divergences: list[torch.Tensor] = []
    cosines: dict[int, list[torch.Tensor]] = {index: [] for index in range(4)}
    for batch in data():
        kept = batch["attention_mask"].bool()
        seen: list[dict[int, torch.Tensor]] = []
        logits = []
        for one in (model, teacher):
            outputs: dict[int, torch.Tensor] = {}
            hooks = [
                block.register_forward_hook(lambda _m, _a, out, i=i, to=outputs: to.update({i: out}))
                for i, block in enumerate(one.model.layers)
            ]
            with torch.no_grad():
                logits.append(one(**batch).logits[:, :-1].double().log_softmax(-1))
            for hook in hooks:
                hook.remove()
            seen.append(outputs)
        difference = (logits[1].exp() * (logits[1] - logits[0])).sum(-1)
        divergences.append(difference[kept[:, 1:] & kept[:, :-1]])
        for index, parts in cosines.items():
            parts.append(cosine_similarity(seen[0][index], seen[1][index], dim=-1)[kept])
    return torch.cat(divergences).mean().item(), {i: torch.cat(c).mean().item() for i, c in cosines.items()}


def test_a_teacher_whose_blocks_are_elsewhere_is_refused(gloo: Gloo, folder: Path) -> None:
    splits = [[0, 1], [2, 3]], [[0], [1, 2, 3]]
    for failure in gloo.run(scores_with_other_teacher, tiny_checkpoint(folder, layers=4), data(1), *splits):
        assert isinstance(failure, RankFailure)
        assert "the teacher's blocks are on other ranks (((0,), (1, 2, 3))) than the model's" in failure.text


# Activations ----------------------------------------------------------------------------------------------


def test_a_score_is_how_much_a_part_adds_to_the_residual_stream(folder: Path) -> None:
    model = whole(heterogeneous_checkpoint(folder))
    result = PipelineStage(model).score(data(), activations=True, micro_batches=3)
    has_ffn = [i for i, (_, ffn) in enumerate(BLOCKS) if isinstance(ffn, int)]
    has_attention = [i for i, (attention, _) in enumerate(BLOCKS) if isinstance(attention, int)]
    assert (sorted(result.ffn_channels), sorted(result.kv_heads)) == (has_ffn, has_attention)
    for index, scores in result.ffn_channels.items():
        down = model.model.layers[index].mlp.down_proj
        assert contribution(model, down, range(5, 6)) == pytest.approx(scores.values[5].item(), rel=1e-4)
    for index, scores in result.kv_heads.items():
        out = model.model.layers[index].self_attn.o_proj
        kv_heads = len(scores.values)
        assert kv_heads == BLOCKS[index][0]
        columns = 64 // kv_heads
        last = range((kv_heads - 1) * columns, 64)
        assert contribution(model, out, last) == pytest.approx(scores.values[-1].item(), rel=1e-4)


def contribution(model: PreTrainedModel, projection: torch.nn.Linear, columns: range) -> float:
    """Root mean square, over tokens, of the norm of what some input columns of a projection add."""
    squares: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []

    def see(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        part = args[0][..., columns.start : columns.stop]
        added = part @ projection.weight[:, columns.start : columns.stop].T
        squares.append(added.square().sum(-1)[kept[-1]])

    with projection.register_forward_pre_hook(see), torch.no_grad():
        for batch in data():
            kept.append(batch["attention_mask"].bool())
            model(**batch)
    return torch.cat(squares).mean().sqrt().item()


def test_a_child_is_made_by_the_scores_of_its_sharded_parent(gloo: Gloo, folder: Path) -> None:
    parent = tiny_checkpoint(folder, layers=4)
    alone = scores_of_one(parent)
    ranks = gloo.run_ok(_scored, parent, data(), {"activations": True}, world_size=3)
    for rank in ranks:  # all ranks have the scores of all blocks, as the children's verb wants them
        for kind in ("ffn_channels", "kv_heads"):
            for index, scores in getattr(alone, kind).items():
                assert torch.allclose(getattr(rank, kind)[index].values, scores.values, rtol=1e-5)
    blocks = {index: BlockConfig(ffn=FFNConfig(32)) for index in (1, 3)}
    child = folder / "by-activations"
    init_child_from_parent(parent, blocks, child, ffn_channels=ranks[0].ffn_channels, progress=False)
    best = alone.ffn_channels[3].values.topk(32).indices.sort().values
    kept, had = (whole(path).model.layers[3].mlp.up_proj.weight for path in (child, parent))
    assert torch.equal(kept, had[best])


def scores_of_one(checkpoint: Path) -> ScoreResult:
    return PipelineStage(whole(checkpoint)).score(data(), activations=True)


def test_what_cannot_be_measured_is_refused_by_name() -> None:
    stage = PipelineStage(family_model("qwen3_moe"))
    with pytest.raises(ConfigError, match="block 0 has no down projection of a dense FFN, so its channel"):
        stage.score(data(1), activations=True)
    with pytest.raises(ConfigError, match="give labels as a model takes them, not shift_labels"):
        stage.score([{"input_ids": data(1)[0]["input_ids"], "shift_labels": data(1)[0]["input_ids"]}])


# Going on -------------------------------------------------------------------------------------------------


def test_a_scoring_goes_on_where_it_broke_on_another_number_of_ranks(
    gloo: Gloo, folder: Path, tmp_path: Path
) -> None:
    checkpoint, dataset = tiny_checkpoint(folder), data(5)
    broke = gloo.run_ok(scores_after_a_break, checkpoint, dataset, tmp_path / "scores", 3)
    for text, taken in broke:
        assert "scoring failed on rank 1 of 2: OSError: the data are gone" in text
        assert taken >= 3
    options = {"resume_dir": tmp_path / "scores", "save_every": 2, "activations": True}
    told: list[int] = []
    stage = PipelineStage(whole(checkpoint))
    ran: list[int] = []
    hook = stage.shard.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    result = stage.score(dataset, **options, progress=told.append)
    hook.remove()
    assert (len(ran), sum(told)) == (3, 5)  # two of five were done
    again = gloo.run_ok(_scored, checkpoint, dataset, options)[-1]  # all are done
    fresh = PipelineStage(whole(checkpoint)).score(dataset, activations=True)
    for one in (result, again):
        assert one.loss == pytest.approx(fresh.loss, rel=1e-6)
        assert one.tokens == fresh.tokens
        assert torch.allclose(
            torch.stack(one.log_probs or ()), torch.stack(fresh.log_probs or ()), equal_nan=True, atol=1e-5
        )
        assert torch.allclose(one.ffn_channels[2].values, fresh.ffn_channels[2].values, rtol=1e-5)


def test_scores_that_are_kept_at_home_are_found_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    stage, told = PipelineStage(whole(tiny_checkpoint(folder))), list[int]()
    for _ in range(2):
        stage.score(data(2), resume_dir="~/scores", progress=told.append)
    assert sum(told) == 4  # of which the second two were done before
    with pytest.raises(ConfigError, match="saved scores are of other data"):
        stage.score(data(3)[1:], resume_dir="~/scores")


def test_scores_of_other_data_or_of_another_model_are_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    stage = PipelineStage(whole(tiny_checkpoint(folder)))
    stage.score(data(2), resume_dir=tmp_path)
    other = [data(1)[0], {"input_ids": data(1)[0]["input_ids"]}]
    with pytest.raises(ConfigError, match="saved scores are of other data: their first 2 batches are not"):
        stage.score(other, resume_dir=tmp_path)
    with pytest.raises(ConfigError, match="the dataset has 1 batches; 2 or more are needed"):
        stage.score(data(1), resume_dir=tmp_path)
    another = PipelineStage(whole(heterogeneous_checkpoint(folder)))
    with pytest.raises(CheckpointError, match=r"holds scores of .*, not of "):
        another.score(data(2), resume_dir=tmp_path)
    with pytest.raises(ConfigError, match="the dataset has 0 batches; 1 or more are needed"):
        stage.score([])
