"""`hf/` beside a training's checkpoint: what Hugging Face and we open, as the model was at the call."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.async_saves import request_for, spoil
from support.gloo import Gloo
from support.pipelines import stage_of
from support.tiny import heterogeneous_checkpoint, tiny_checkpoint
from support.training import adam_of, train
from transformers import AutoModelForCausalLM

from patchers.errors import ConfigError
from sharded_ckpt.checkpoint.coordinator import Solo
from sharded_ckpt.loading.verbs import load_and_shard_model
from sharded_ckpt.runtime import default_runtime
from sharded_ckpt.training import AsyncCallsQueue, CheckpointConfig, GlobalState, StateDictTransforms
from sharded_ckpt.training.checkpointing.hf_export import HFExport
from sharded_ckpt.training.checkpointing.saving import save_checkpoint

IDS = torch.arange(4, 20).reshape(2, 8)


def adapted(base: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def saved(directory: Path, model: Any, state: GlobalState, worker: Any = None) -> torch.Tensor:
    """Save a model that has trained a step, with an export; return its logits then, and spoil it."""
    optimizer = adam_of(model)
    train(model, [optimizer], [0])
    before = logits(model)
    export = HFExport.gather(state, model, Solo(), where=directory)
    if worker is None:
        request_for(directory, (model, optimizer), export=export).execute_sync()
        return before
    with AsyncCallsQueue(worker=worker) as queue:
        queue.schedule_async_request(request_for(directory, (model, optimizer), queue, export=export))
        spoil((model, optimizer))
    return before


@pytest.mark.parametrize("worker", [None, "thread", pytest.param("process", marks=pytest.mark.slow)])
def test_the_export_opens_by_itself_and_is_as_it_was_at_the_call(tmp_path: Path, worker: Any) -> None:
    model = load_and_shard_model("auto", heterogeneous_checkpoint(tmp_path), materialize=True)
    before = saved(tmp_path / "out", model, GlobalState(None), worker)
    found = load_and_shard_model("auto", tmp_path / "out" / "hf")
    assert torch.equal(logits(found), before)
    assert (tmp_path / "out" / "training_state.json").exists()


def test_adapters_are_merged_and_the_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, dtype=torch.float32)
    model = adapted(load_and_shard_model("auto", checkpoint, materialize=True))
    before = saved(tmp_path / "out", model, GlobalState(None), "thread")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf")
    assert torch.allclose(logits(found), before, rtol=1e-4, atol=1e-4)

    state = GlobalState(None, transforms=StateDictTransforms(export_dtype=torch.bfloat16))
    export = HFExport.gather(state, model, Solo(), where=tmp_path / "low")
    assert {tensor.dtype for tensor in export.tensors.values()} == {torch.bfloat16}


def test_where_only_adapters_are_saved_so_is_the_export(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, dtype=torch.float32)
    model = adapted(load_and_shard_model("auto", checkpoint, materialize=True))
    before = saved(tmp_path / "out", model, GlobalState(None, peft_config=model.peft_config["default"]))
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        found = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "hf").eval()
    assert torch.allclose(logits(found), before, rtol=1e-4, atol=1e-4)


class Counting(StateDictTransforms):
    """Transforms that count how often a model is exported by them."""

    exports = 0

    def export(self, state_dict: Any) -> Any:
        self.exports += 1
        return super().export(state_dict)


def test_a_save_makes_the_export_once(tmp_path: Path) -> None:
    model = load_and_shard_model("auto", tiny_checkpoint(tmp_path), materialize=True)
    config = CheckpointConfig(save=str(tmp_path / "run"), also_save_hf_checkpoint=True)
    transforms = Counting(export_dtype=torch.bfloat16)
    save_checkpoint(GlobalState(config, transforms=transforms), model, None, None, 0)
    assert (tmp_path / "run" / "iter_0000000" / "hf" / "config.json").exists()
    assert transforms.exports == 1


def test_a_model_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a Linear has no config, which a checkpoint needs"):
        HFExport.gather(GlobalState(None), torch.nn.Linear(2, 2), Solo(), where=tmp_path)


def export_from_stages(checkpoint: str, out: str) -> None:
    stage = stage_of(Path(checkpoint), materialize=True)
    optimizer = adam_of(stage.shard)
    train(stage.shard, [optimizer], [0])
    export = HFExport.gather(GlobalState(None), stage.shard, default_runtime().control, where=out)
    with AsyncCallsQueue() as queue:
        training = (stage.shard, optimizer)
        queue.schedule_async_request(request_for(Path(out), training, queue, export=export))
        spoil(training)
    assert dist.get_world_size() == 3


def test_ranks_export_one_checkpoint_together(gloo: Gloo, tmp_path: Path) -> None:
    checkpoint = heterogeneous_checkpoint(tmp_path, tied=True)
    gloo.run_ok(export_from_stages, str(checkpoint), str(tmp_path / "ranks"), world_size=3)
    model = load_and_shard_model("auto", checkpoint, materialize=True)
    before = saved(tmp_path / "one", model, GlobalState(None))
    found = load_and_shard_model("auto", tmp_path / "ranks" / "hf")
    assert torch.equal(logits(found), before)
    files = sorted((tmp_path / "ranks" / "hf").glob("*.safetensors"))
    assert len(files) == 3
    assert {name for file in files for name in load_file(file)} == {
        name for file in (tmp_path / "one" / "hf").glob("*.safetensors") for name in load_file(file)
    }
