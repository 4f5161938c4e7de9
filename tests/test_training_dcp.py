"""Other people's DCP checkpoints: read without running what is in them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from patchers.errors import CheckpointError, CheckpointNotFoundError, MissingKeysError
from sharded_ckpt.training import DcpWeights, SafeFileSystemReader, SafeLoadPlanner, read_dcp_metadata

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

STATE = {
    "weight": torch.randn(4, 3),
    "half": torch.randn(5).bfloat16(),
    "steps": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 2),
    "packed": torch.ones(3).to(torch.float8_e4m3fn),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dcp.save(
        {"model": dict(STATE), "epoch": 3, "notes": {"a": [1, (2.5, None)]}},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    return tmp_path


def metadata_of(directory: Path) -> Metadata:
    return pickle.loads((directory / ".metadata").read_bytes())


def write_metadata(directory: Path, metadata: Any) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def test_tensors_of_every_kind_are_read_and_others_are_no_tensors(saved):
    weights = DcpWeights(saved, "model.")
    assert set(weights.specs()) == set(STATE)
    assert weights.specs()["half"] == ("BF16", (5,))
    found = weights.read(STATE)
    assert all(
        found[name].dtype == t.dtype and torch.equal(found[name].float(), t.float())
        for name, t in STATE.items()
    )
    assert list(weights.read(["mask"])) == ["mask"]
    with pytest.raises(MissingKeysError, match=r"not in the checkpoint: more"):
        weights.read(["mask", "more"])


def test_torch_itself_can_read_safely_and_plain_data_comes_with_it(saved):
    state = {
        "model": {name: torch.zeros_like(t) for name, t in STATE.items()},
        "epoch": 0,
        "notes": {"a": []},
    }
    state["notes"] = {"a": [0, (0.0, None)]}
    dcp.load(state, storage_reader=SafeFileSystemReader(saved), planner=SafeLoadPlanner(), no_dist=True)
    assert torch.equal(state["model"]["weight"], STATE["weight"])
    assert state["epoch"] == 3
    assert state["notes"]["a"][0] == 1


class Hostile:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_hostile_metadata_is_refused_and_nothing_of_it_runs(saved, tmp_path):
    metadata, mark = metadata_of(saved), tmp_path / "was here"
    metadata.planner_data = Hostile(mark)
    write_metadata(saved, metadata)
    for read in (read_dcp_metadata, DcpWeights, lambda d: SafeFileSystemReader(d).read_metadata()):
        with pytest.raises(
            CheckpointError, match=r"\.metadata: not read, it asks for posix\.mkdir, which no check"
        ):
            read(saved)
    assert not mark.exists()
    pickle.loads((saved / ".metadata").read_bytes())
    assert mark.exists()  # so the test would have noticed


@pytest.mark.parametrize("name", ["eval", "getattr", "__import__"])
def test_no_function_is_reached_through_a_module_that_is_allowed(saved, name):
    raw = b"\x80\x04\x8c\x08builtins\x94\x8c" + bytes([len(name)]) + name.encode() + b"\x94\x93\x94."
    (saved / ".metadata").write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"it asks for builtins\.{name}"):
        read_dcp_metadata(saved)
    dotted = b"\x80\x04\x8c\x05torch\x94\x8c\x07os.exec\x94\x93\x94."
    (saved / ".metadata").write_bytes(dotted)
    with pytest.raises(CheckpointError, match=r"it asks for torch\.os\.exec"):
        read_dcp_metadata(saved)


def test_a_hostile_value_is_refused_and_nothing_of_it_runs(tmp_path):
    mark = tmp_path / "was here"
    dcp.save({"weight": torch.zeros(2), "bad": Hostile(mark)}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert torch.equal(DcpWeights(tmp_path / "c").read(["weight"])["weight"], torch.zeros(2))
    state = {"bad": 0}
    with pytest.raises((CheckpointError, dcp.CheckpointException), match=r"bad: holds more than plain data"):
        dcp.load(
            state,
            storage_reader=SafeFileSystemReader(tmp_path / "c"),
            planner=SafeLoadPlanner(),
            no_dist=True,
        )
    assert not mark.exists()


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_files_outside_of_the_directory_are_refused(saved, path):
    metadata = metadata_of(saved)
    for info in metadata.storage_data.values():
        info.relative_path = path
    write_metadata(saved, metadata)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        DcpWeights(saved)


def test_a_tensor_that_its_chunks_do_not_cover_is_refused(saved):
    metadata = metadata_of(saved)
    said = metadata.state_dict_metadata["model.weight"]
    chunk = said.chunks[0]
    chunk.sizes = torch.Size([2, 3])
    write_metadata(saved, metadata)
    with pytest.raises(
        CheckpointError, match=r"chunks of model\.weight have 6 elements, its shape \(4, 3\) has 12"
    ):
        read_dcp_metadata(saved)
    chunk.offsets = torch.Size([3, 0])
    write_metadata(saved, metadata)
    with pytest.raises(CheckpointError, match=r"a chunk of model\.weight lies outside of its shape \(4, 3\)"):
        read_dcp_metadata(saved)


def test_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"no \.metadata, so no checkpoint of torch DCP"):
        DcpWeights(tmp_path)
    write_metadata(tmp_path, {"a": 1})
    with pytest.raises(CheckpointError, match=r"expected the metadata of a checkpoint, found dict"):
        DcpWeights(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"\x80\x04garbage")
    with pytest.raises(CheckpointError, match=r"\.metadata: not read, "):
        DcpWeights(tmp_path)


def test_a_broken_data_file_is_an_ordinary_error(saved):
    for file in saved.glob("*.distcp"):
        file.write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        DcpWeights(saved, "model.").read(["weight"])


def save_spread(out: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) + number)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    dcp.save({"model": model.state_dict(), "rank": dist.get_rank()}, checkpoint_id=out)


def test_tensors_that_were_spread_over_ranks_come_out_whole(gloo, tmp_path):
    gloo.run_ok(save_spread, str(tmp_path))
    found = DcpWeights(tmp_path, "model.").read(["0.weight", "1.bias"])
    assert torch.equal(found["0.weight"], torch.arange(15.0).reshape(5, 3))
    assert torch.equal(found["1.bias"], torch.arange(3.0) + 3)
