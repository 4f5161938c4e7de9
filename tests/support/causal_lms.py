"""The table of every causal language model of transformers: what was found out about it, or why not.

`PYTHONPATH=.:tests python -m support.causal_lms > docs/causal_lms.md` writes it anew.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from patchers import ModelDescriptor, capabilities
from patchers.errors import FamilyError
from support.families import family_config

ENTRIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TABLE = Path(__file__).parents[2] / "docs" / "causal_lms.md"
SIZES = {
    "kv_heads": "KV heads",
    "ffn_width": "FFN width",
    "experts": "experts",
    "experts_per_token": "top-k",
    "expert_width": "expert width",
    "shared_expert_width": "shared expert width",
}
HEAD = """# Causal language models of transformers

Every entry of transformers' mapping of causal language models (5.23), built small on the meta device. The
descriptor is derived by rule, its parts are tried out, and its sizes are found by building layers twice. The
columns *removable* and *linear* say which parts a block can do without, or have a linear layer in place of;
*sizes* are those that one block may have otherwise than the others. Where nothing could be derived, the last
column says why: see [adding a family](adding_a_family.md).

That what is claimed here computes the right thing is shown by running models, family by family, in
`tests/test_family_heterogeneous.py`; entries that are not in that test are derived and not run.

| `model_type` | class | layers | parts | removable | linear | sizes | not derived |
|---|---|---|---|---|---|---|---|
"""


def row(entry: str) -> str:
    """The row of one entry of the mapping."""
    try:
        cells = [*_found(entry), ""]
    except FamilyError as error:
        cells = [""] * 6 + [re.sub(r"\s+", " ", str(error)).replace("|", "/")[:160]]
    return f"| {' | '.join([f'`{entry}`', *cells])} |"


def small_config(entry: str) -> PreTrainedConfig:
    """A small config of an entry, or, where the common sizes do not go together, its own default one."""
    try:
        config = family_config(entry)
        ModelDescriptor.from_config(config).layer_kinds  # noqa: B018
        return config
    except Exception:  # transformers raises whatever a class raises that is given sizes it cannot have
        pass
    try:
        return CONFIG_MAPPING[entry]()
    except Exception as error:
        raise FamilyError(f"its default config cannot be made: {error}") from error


def committed_rows() -> dict[str, str]:
    """The rows of the committed table, by entry."""
    lines = TABLE.read_text().splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `") and "model_type" not in line}


def _found(entry: str) -> Iterator[str]:
    config = small_config(entry)
    descriptor = ModelDescriptor.from_config(config)
    kinds = descriptor.layer_kinds
    can = capabilities(config, descriptor)
    parts = [" + ".join(part.name for part in (*kind.attention, *kind.ffn)) for kind in kinds]
    yield descriptor.model_class.__name__
    yield f"`{descriptor.layers}`"
    yield " / ".join(dict.fromkeys(parts))
    for kind in ("no_op", "linear"):
        yield ", ".join(name for name in ("attention", "ffn") if can[f"{kind}_{name}"] is True)
    yield ", ".join(name for cell, name in SIZES.items() if can[cell] is True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(HEAD + "\n".join(map(row, ENTRIES)))
