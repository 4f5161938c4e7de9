"""From where a training starts: decided before anything is read. Pure but for asking what exists."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from patchers.errors import CheckpointNotFoundError, ConfigError

StateFormat: TypeAlias = Literal["training_state", "hf", "dcp"]

_TRAINING_STATE, _DCP = "training_state.json", ".metadata"


@dataclass(frozen=True)
class LoadSpec:
    """One source that a model is filled from.

    Attributes:
        checkpoint_id: The directory.
        model_only: Whether optimizers are left alone.
        from_hf: Whether it has the names and forms of Hugging Face.
        from_quantized: Whether its weights are quantised in blocks.
        partial: Whether it may lack what the model wants: another source has it.
        format: What lies there.
        prefix: What its names begin with and memory's do not.
    """

    checkpoint_id: str
    model_only: bool
    from_hf: bool
    from_quantized: bool
    partial: bool = False
    format: StateFormat = "training_state"
    prefix: str = ""


def resolve_initial_load(
    initial_load_path: str | os.PathLike[str] | None = None,
    *,
    resume_path: str | os.PathLike[str] | None = None,
    additional_load_path: str | os.PathLike[str] | None = None,
    from_hf: bool = False,
    from_quantized: bool = False,
    model_only: bool = True,
    additional_from_hf: bool = False,
    base_is_frozen: bool = False,
    hf_assets_path: str | os.PathLike[str] | None = None,
    prefix: str = "",
) -> tuple[LoadSpec, ...]:
    """Say from where a training starts: nothing (a fresh start), one source, or a base and an overlay.

    To be decided on one rank and told to the others, who may see another state of a network file system.

    Args:
        initial_load_path: The base.
        resume_path: What this training itself has saved, if anything. It wins: the others are not looked at,
            so that a training can be restarted with the same arguments.
        additional_load_path: What is put over the base; it may hold a part of the model.
        from_hf: Whether the base is a checkpoint of Hugging Face.
        from_quantized: Whether its weights are quantised in blocks of floats of 8 bits (fp8) or 4 (mxfp4).
        model_only: Whether the optimizer starts fresh.
        additional_from_hf: Whether the overlay is a checkpoint of Hugging Face.
        base_is_frozen: Whether `resume_path` holds only what was trained, so that the base is needed, too.
        hf_assets_path: Where the base is if no path is given and it comes from Hugging Face.
        prefix: What the names of the base begin with and memory's do not, if torch DCP has written it: often
            `"model."`.

    Raises:
        ConfigError: The arguments contradict each other.
        CheckpointNotFoundError: A path is no directory, or holds no checkpoint.

    Example:
        >>> resolve_initial_load()
        ()
    """
    if resume_path is not None:
        resumed = _spec(resume_path, "resume_path", partial=base_is_frozen, model_only=False)
        if not base_is_frozen:
            return (resumed,)
        base = _initial(initial_load_path, from_hf, from_quantized, True, hf_assets_path, prefix)
        return (*base, resumed)
    base = _initial(initial_load_path, from_hf, from_quantized, model_only, hf_assets_path, prefix)
    if additional_load_path is None:
        return base
    overlay = _spec(
        additional_load_path,
        "additional_load_path",
        partial=True,
        model_only=True,
        from_hf=additional_from_hf,
    )
    return (*base, overlay)


def _initial(
    path: str | os.PathLike[str] | None,
    from_hf: bool,
    from_quantized: bool,
    model_only: bool,
    assets: str | os.PathLike[str] | None,
    prefix: str,
) -> tuple[LoadSpec, ...]:
    if from_quantized and not from_hf:
        raise ConfigError("from_quantized=True is for checkpoints of Hugging Face: pass from_hf=True, too")
    if from_hf and not model_only:
        raise ConfigError("a checkpoint of Hugging Face has no optimizer state: pass model_only=True")
    if from_hf and path is None and assets is None:
        raise ConfigError("from_hf=True needs initial_load_path, or hf_assets_path")
    if (path := path if path is not None else assets if from_hf else None) is None:
        return ()
    spec = _spec(
        path,
        "initial_load_path",
        partial=False,
        model_only=model_only,
        from_hf=from_hf,
        from_quantized=from_quantized,
    )
    if prefix and spec.format != "dcp":
        raise ConfigError(
            f"prefix={prefix!r} is for directories of torch DCP; use PrefixKeys in the transforms"
        )
    return (replace(spec, prefix=prefix),)


def _spec(
    path: str | os.PathLike[str],
    option: str,
    *,
    partial: bool,
    model_only: bool,
    from_hf: bool = False,
    from_quantized: bool = False,
) -> LoadSpec:
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointNotFoundError(f"{option}: {path} is no directory")
    kind: StateFormat = "hf"
    if not from_hf:
        known: dict[str, StateFormat] = {_TRAINING_STATE: "training_state", _DCP: "dcp"}
        kinds = [kind for file, kind in known.items() if (directory / file).exists()]
        if not kinds:
            raise CheckpointNotFoundError(
                f"{option}: {path} has neither {_TRAINING_STATE} nor {_DCP}; is it a checkpoint of Hugging "
                "Face? Then say so (from_hf=True, additional_from_hf=True)"
            )
        kind = kinds[0]
    return LoadSpec(os.fspath(path), model_only, from_hf, from_quantized, partial, kind)
