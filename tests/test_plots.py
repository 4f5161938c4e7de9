"""Pictures of models and plans: what is drawn, said as shapes, texts and colours."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from support.hollow import LLAMA, hollow_checkpoint, llama_shapes, pruned_checkpoint, without
from support.pictures import IMAGES, write

from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig, MambaConfig, MoEConfig
from patchers.errors import BlockConfigError, CheckpointError, ConfigError, OwnershipError
from sharded_ckpt.cli import main
from sharded_ckpt.demo.published_kind import published_kind
from sharded_ckpt.ownership import OwnershipPlan, plan_ownership
from sharded_ckpt.plots import plot_balance, plot_blocks, plot_ownership, plot_plan, plot_reads
from sharded_ckpt.plots.blocks import COLORS
from sharded_ckpt.plots.drawing import new_figure
from sharded_ckpt.report.file_reads import file_reads
from sharded_ckpt.report.model_blocks import model_blocks
from sharded_ckpt.report.rank_reads import rank_reads


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pruned_checkpoint(tmp_path / "model")


@pytest.fixture
def ax() -> Axes:
    axes: Axes = new_figure(8, 3).subplots()
    return axes


def bars(ax: Axes) -> list[tuple[float, float, str]]:
    """Where each bar of a strip stands, how high it is, and its colour."""
    from matplotlib.colors import to_hex

    return [
        (round(bar.get_x() + bar.get_width() / 2, 6), round(bar.get_height(), 6), to_hex(bar.get_facecolor()))
        for container in ax.containers
        for bar in container  # type: ignore[union-attr]
    ]


def legend(ax: Axes) -> list[str]:
    found = ax.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def tick_texts(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def test_parts_are_as_high_as_their_sizes_and_removed_ones_are_gaps(folder: Path, ax: Axes) -> None:
    plot_blocks(model_blocks(folder), ax=ax)
    attention, ffn = COLORS["attention"], COLORS["FFN"]
    assert bars(ax) == [
        (0, 0.45, attention),
        (2, 0.45, attention),
        (0, -1, ffn),
        (1, -1, ffn),
        (2, -0.5, ffn),
    ]
    assert legend(ax) == ["attention", "FFN", "removed"]
    assert tick_texts(ax) == ["2 KV heads", "96 wide", "48 wide"]


def test_every_kind_of_part_has_a_colour_of_its_own(ax: Axes) -> None:
    experts = MoEConfig(8, 2, 100, 200)
    blocks = [
        BlockConfig(AttentionConfig(replace_with_linear=True), FFNConfig(moe=experts)),
        BlockConfig(AttentionConfig(mamba=MambaConfig(16, 4, 8, 1)), FFNConfig(2000)),
        BlockConfig(AttentionConfig(4), FFNConfig(no_op=True)),
        None,
    ]
    plot_blocks(blocks, ax=ax)
    assert sorted(legend(ax)) == sorted(COLORS)
    assert len(set(COLORS.values())) == len(COLORS)
    (depth,) = [height for at, height, color in bars(ax) if color == COLORS["experts"]]
    assert depth == -0.5, "8 experts of 100 and a shared one of 200, beside an FFN of 2000"


def test_sizes_are_named_where_their_bars_end(ax: Axes) -> None:
    plot_blocks([BlockConfig(AttentionConfig(heads), FFNConfig(width)) for heads, width in SIZES], ax=ax)
    ends = dict(zip(tick_texts(ax), ax.get_yticks(), strict=True))
    assert ends == pytest.approx(
        {"8 KV heads": 0.45, "4 KV heads": 0.225, "1 KV head": 0.45 / 8, "1 000 wide": -1, "500 wide": -0.5}
    )


SIZES = [(8, 1000), (1, 10), (4, 900), (8, 20), (8, 30)]


def test_a_config_tells_the_same_blocks_as_its_checkpoint(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert model_blocks(config) == model_blocks(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert model_blocks(folder) == model_blocks(config)


def test_a_model_without_blocks_cannot_be_drawn() -> None:
    with pytest.raises(BlockConfigError, match="there are no blocks to draw"):
        plot_blocks([])


def band_numbers(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_each_rank_has_a_band_over_its_blocks(folder: Path, ax: Axes) -> None:
    plan = plan_ownership(str(folder), 2)
    plot_ownership(model_blocks(folder), plan, ax=ax)
    bands = [bar for bar in (patch for container in ax.containers[2:] for patch in container)]  # type: ignore[union-attr]
    spans = [(round(bar.get_x() + 0.43), round(bar.get_x() + bar.get_width() + 0.57) - 1) for bar in bands]
    assert spans == [(owned[0], owned[-1]) for owned in plan.blocks]
    assert band_numbers(ax) == ["0", "1"]
    assert tick_texts(ax)[-1] == "rank"


def test_a_rank_may_own_several_runs_or_nothing(ax: Axes) -> None:
    plan = OwnershipPlan(((0, 3), (1, 2), ()), (1, 1, 1, 1))
    plot_ownership([BlockConfig(AttentionConfig(2), FFNConfig(8))] * 4, plan, ax=ax)
    assert band_numbers(ax) == ["0", "0", "1"]


def test_a_plan_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(OwnershipError, match="the plan is of 2 blocks, the model has 4"):
        plot_ownership(model_blocks(folder), OwnershipPlan(((0, 1),), (1, 1)))


@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_the_bars_of_a_balance_are_what_ranks_have(folder: Path, ranks: int, ax: Axes) -> None:
    plan = plan_ownership(str(folder), ranks, budgets="1 GB")
    even = plan_ownership(str(folder), ranks, split="even")
    plot_balance(plan, even, ax=ax)
    assert [height for _, height, _ in bars(ax)] == [*even.totals, *plan.totals]
    assert [text.split(":")[0] for text in legend(ax)] == ["even by number", "min-max", "mean", "budget"]
    largest = f"{max(plan.totals) / 1e3:.2f} kB, {plan.imbalance:.2f}x the mean"
    assert legend(ax)[1] == f"min-max: at most {largest}"


def test_splits_that_count_different_things_are_not_compared(folder: Path) -> None:
    plan, even = plan_ownership(str(folder), 2), plan_ownership(str(folder), 2, by="count")
    text = "the plan is of 2 ranks by bytes, the even split of 2 ranks by count: they cannot be compared"
    with pytest.raises(OwnershipError, match=text):
        plot_balance(plan, even)


def tied_checkpoint(folder: Path) -> Path:
    shapes = without(llama_shapes(), "lm_head")
    return hollow_checkpoint(folder, shapes, {**LLAMA, "tie_word_embeddings": True})


@pytest.mark.parametrize("make", [pruned_checkpoint, tied_checkpoint])
def test_the_ranges_of_ranks_add_up_to_what_they_read(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    plan = plan_ownership(str(folder), 3)
    files = file_reads(folder, plan)
    for rank, reads in enumerate(rank_reads(folder, plan)):
        ranges = {file.name: file.ranges[rank] for file in files if file.ranges[rank]}
        assert tuple(sorted(ranges)) == reads.files
        assert sum(end - begin for spans in ranges.values() for begin, end in spans) == reads.nbytes
    assert [file.nbytes for file in files] == [(folder / file.name).stat().st_size for file in files]


@pytest.mark.parametrize(("rank", "readers"), [(None, [0, 1]), (1, [1])])
def test_what_is_read_is_drawn_over_the_files(
    folder: Path, rank: int | None, readers: Sequence[int], ax: Axes
) -> None:
    plan = plan_ownership(str(folder), 2)
    plot_reads(file_reads(folder, plan), rank=rank, ax=ax)
    sizes = [f"rank {at}: {reads.nbytes / 1e3:.2f} kB" for at, reads in enumerate(rank_reads(folder, plan))]
    assert legend(ax) == [*(sizes[at] for at in readers), "not read" if rank else "header"]
    assert tick_texts(ax) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_rank_that_does_not_exist_is_refused(folder: Path) -> None:
    files = file_reads(folder, plan_ownership(str(folder), 2))
    with pytest.raises(CheckpointError, match="there is no rank 2: the plan is of 2"):
        plot_reads(files, rank=2)
    with pytest.raises(CheckpointError, match="there are no files to draw"):
        plot_reads([])


@pytest.mark.parametrize(("ranks", "blocks"), [(1, 162), (16, 162), (64, 40), (1, 1)])
def test_large_plans_are_drawn_without_a_warning(ranks: int, blocks: int, tmp_path: Path) -> None:
    config = published_kind(blocks)
    plan, even = plan_ownership(config, ranks), plan_ownership(config, ranks, split="even")
    figure = plot_plan(model_blocks(config), plan, even)
    figure.savefig(tmp_path / "plan.png")
    assert figure._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"  # type: ignore[attr-defined]
    assert png_size(tmp_path / "plan.png") > (300, 300)


def test_the_made_up_config_is_of_the_published_kind() -> None:
    config = published_kind(162, seed=3)
    blocks = [block for block in model_blocks(config) if block is not None]
    assert config == published_kind(162, seed=3) != published_kind(162)
    assert len(blocks) == 162
    assert {block.attention.no_op for block in blocks} == {True, False}
    assert any(block.attention.replace_with_linear for block in blocks)
    widths = {block.ffn.intermediate_size for block in blocks} - {None}
    assert len(widths) >= 4
    assert plan_ownership(config, 8, split="even").imbalance > plan_ownership(config, 8).imbalance


def png_size(file: Path) -> tuple[int, int]:
    width, height = struct.unpack(">II", file.read_bytes()[16:24])
    return width, height


def test_the_pictures_of_the_documentation_are_drawn_by_this_code(tmp_path: Path) -> None:
    drawn = {file.name: png_size(file) for file in write(tmp_path)}
    committed = {file.name: file for file in IMAGES.glob("*.png")}
    assert {name: png_size(file) for name, file in committed.items()} == drawn
    for name, file in committed.items():
        assert file.stat().st_size < 60_000, name
        sizes = sorted([file.stat().st_size, (tmp_path / name).stat().st_size])
        assert sizes[1] < 1.5 * sizes[0], f"{name} shows something else: run python tests/support/pictures.py"


def test_plan_draws_into_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = folder.parent / "plan.png"
    assert main(["plan", str(folder), "--ranks", "2", "--png", str(target)]) == 0
    said = capsys.readouterr()
    assert said.err == f"{target}: drawn\n"
    assert said.out.startswith("4 blocks over 2 ranks by bytes")
    assert png_size(target) > (300, 300)


def test_a_plan_of_a_config_alone_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, target = tmp_path / "any.json", tmp_path / "plan.png"
    config.write_text(json.dumps(published_kind(40)))
    assert main(["plan", str(config), "--ranks", "4", "--png", str(target), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ranks"]) == 4
    assert png_size(target) > (300, 300)


def test_a_picture_that_cannot_be_written_is_an_error_of_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = folder / "no" / "plan.png"
    assert main(["plan", str(folder), "--ranks", "2", "--png", str(target)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("sharded-ckpt plan: ")
    assert str(target) in said
    assert said.count("\n") == 1


def test_without_matplotlib_the_error_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = "pictures are drawn with matplotlib, which is not installed: python -m pip install matplotlib, or"
    with pytest.raises(ConfigError, match=text):
        plot_blocks(model_blocks(folder))
    assert main(["plan", str(folder), "--ranks", "2", "--png", "plan.png"]) == 1
    assert text in capsys.readouterr().err


def test_a_plan_without_a_picture_imports_no_matplotlib(folder: Path) -> None:
    code = (
        "import sys, sharded_ckpt.plots\nfrom sharded_ckpt.cli import main\n"
        f"assert main(['plan', {str(folder)!r}, '--ranks', '2']) == 0\n"
        "print([name for name in ('matplotlib', 'torch', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")
