"""Which tensor of a model each key of a checkpoint feeds, by transformers' own rules of conversion.

Families rename tensors between files and modules, fuse experts, or put the backbone under another prefix.
transformers keeps those rules to itself; the one function here is all that looks at them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from transformers import PreTrainedModel

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    IS_KNOWN = True
except ImportError:  # another transformers: its loader alone knows, while it loads
    IS_KNOWN = False


def targets_of(model: PreTrainedModel, names: Collection[str], keys: Iterable[str]) -> dict[str, str] | None:
    """Return the name in the model that each key becomes, be there such a tensor or not.

    Keys that are fused into one tensor all become its name; a key that is split becomes the first of its
    parts.

    Args:
        model: The whole model; on meta will do.
        names: Its tensors, those of `state_dict()`.
        keys: The keys of the checkpoint.

    Returns:
        The names by key, in the order in which transformers loads; None if this transformers does not tell.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
        >>> model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=1, num_key_value_heads=1))
        >>> key = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
        >>> targets_of(model, model.state_dict(), [key])[key]
        'model.layers.0.mlp.experts.gate_up_proj'
    """
    if not IS_KNOWN:
        return None
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    prefix, present = model.base_model_prefix, dict.fromkeys(names, True)
    targets = {}
    for key in sorted(keys, key=dot_natural_key):  # some rules wait for a key that comes first
        name, _ = rename_source_key(key, renamings, converters, prefix, present)
        if name not in present and key in present:  # then transformers takes the key as it is
            name, _ = rename_source_key(key, [], [], prefix, present)
        targets[key] = name
    return targets
