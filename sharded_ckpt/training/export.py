"""What was trained, as a checkpoint for others: converters undone, cast, in Hugging Face's names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from patchers.errors import ConfigError
from sharded_ckpt.checkpoint.coordinator import Coordinator, together
from sharded_ckpt.runtime import as_runtime
from sharded_ckpt.saving.saved_tensors import in_files, unwrapped
from sharded_ckpt.saving.verbs import save_sharded_checkpoint
from sharded_ckpt.training.dtensors import whole_tensors
from sharded_ckpt.training.model_wrapper import ModelWrapper
from sharded_ckpt.training.places import without_extra_state
from sharded_ckpt.training.transforms import StateDictMode, StateDictTransforms

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from sharded_ckpt.runtime import Runtime


def export_checkpoint(
    directory: str | os.PathLike[str],
    model: nn.Module | Sequence[nn.Module],
    *,
    transforms: StateDictTransforms | None = None,
    config: PreTrainedConfig | None = None,
    runtime: Runtime | Any = None,
    source: str | os.PathLike[str] | None = None,
    max_shard_size: int | str | None = None,
    durable: bool = True,
    manifest: bool = False,
    overwrite: bool = True,
) -> None:
    """Write the model that the ranks have trained as a complete checkpoint, which `from_pretrained` opens.

    Collective. Converters are undone in the model's own dtype, then the result is cast, then translated; the
    live model stays as it is.

    Args:
        directory: Where to.
        model: The model of this rank, or its parts.
        transforms: What is done to it.
        config: By default the model's own.
        runtime: Where we are. By default torch.distributed says, or this is the only process.
        source: The checkpoint from which tokenizer and other small files are carried over.
        max_shard_size: Bytes of tensors in one file, or a text such as `"5GB"`.
        durable: Whether the checkpoint must survive a power cut once this returns.
        manifest: Whether to write `manifest.json`, with the size and SHA-256 of each file.
        overwrite: Whether the directory may hold something already.

    Raises:
        ConfigError: The model has no config, and none was given.
        CheckpointError: Ranks have different tensors of one name.
        CollectiveError: In place of these on all ranks, when some of several failed.

    Example:
        >>> import tempfile, torch
        >>> from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_checkpoint(folder, model, transforms=StateDictTransforms(export_dtype=torch.bfloat16))
        ...     AutoModelForCausalLM.from_pretrained(folder).dtype
        torch.bfloat16
    """
    control = as_runtime(runtime).control
    exported, config = exported_state(model, control, transforms=transforms, config=config, where=directory)
    save_sharded_checkpoint(
        exported,
        directory,
        config=config,
        runtime=runtime,
        source=source,
        max_shard_size=max_shard_size,
        durable=durable,
        manifest=manifest,
        overwrite=overwrite,
    )


def exported_state(
    model: nn.Module | Sequence[nn.Module],
    control: Coordinator,
    *,
    transforms: StateDictTransforms | None = None,
    config: PreTrainedConfig | None = None,
    where: object = "a checkpoint",
) -> tuple[dict[str, Any], PreTrainedConfig]:
    """Return what this rank exports of the model, as it is in files, and the config; collective.

    Raises:
        ConfigError: The model has no config, and none was given.
    """
    transforms = transforms or StateDictTransforms()
    with together(control, f"preparing the export to {where}"):
        wrapper = ModelWrapper(model, transforms=transforms)
        native = _native(wrapper.model[0])
        config = config if config is not None else getattr(native, "config", None)
        if config is None:
            raise ConfigError(
                f"a {type(native).__name__} has no config, which a checkpoint needs: pass config=…"
            )
        state = without_extra_state(wrapper.state_dict(StateDictMode.FULL))
    whole = whole_tensors(state, control, where)
    with together(control, f"preparing the export to {where}"):
        return _exported(native, transforms, whole), config


def _exported(
    native: nn.Module, transforms: StateDictTransforms, state: Mapping[str, Tensor]
) -> dict[str, Any]:
    exported = transforms.export(state)
    return exported if transforms.sd_adapter is not None else dict(in_files(native, exported))


def _native(part: nn.Module) -> nn.Module:
    """Return the model inside of wrappers and of peft."""
    model: Any = unwrapped(part)
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model
