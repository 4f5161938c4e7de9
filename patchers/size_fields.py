"""The config fields by which one decoder layer says its sizes, found by trial.

A table of names says where to look (`base_sizes.SIZE_FIELDS`), and a trial decides: the layer is built on
meta with two values of the field, and the sides of its tensors that move in step are where the size shows. A
name that means something else in a family, or nothing, is found out this way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from patchers.base_sizes import SIZE_FIELDS
from patchers.probe import LayerKind
from patchers.size_marks import Mark, find_marks, fractions_of, numbers_of, sides_of

QUERY_HEADS, KV_HEADS, WIDTH = "num_attention_heads", "num_key_value_heads", "intermediate_size"
EXPERTS, TOP_K = "num_local_experts", "num_experts_per_tok"
EXPERT_WIDTH, SHARED_WIDTH = "expert_intermediate_dim", "shared_expert_intermediate_dim"

_FIELDS = {
    QUERY_HEADS: (*SIZE_FIELDS["num_attention_heads"], "swa_num_attention_heads"),
    KV_HEADS: (
        *SIZE_FIELDS["num_key_value_heads"],
        "num_global_key_value_heads",
        "swa_num_key_value_heads",
        "attn_config.kv_n_heads",
    ),
    WIDTH: (*SIZE_FIELDS["intermediate_size"], "intermediate_size_mlp", "dense_intermediate_size"),
    EXPERTS: (*SIZE_FIELDS["num_experts"], "ffn_config.moe_num_experts"),
    TOP_K: (*SIZE_FIELDS["num_experts_per_tok"], "num_experts_per_token", "ffn_config.moe_top_k"),
    EXPERT_WIDTH: (
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        *SIZE_FIELDS["intermediate_size"],
        "ffn_config.ffn_hidden_size",
    ),
    SHARED_WIDTH: SIZE_FIELDS["shared_expert_intermediate_size"],
}
_SOME_SIZE = 64


@dataclass(frozen=True)
class SizeField:
    """The config field that says a size of one layer.

    Attributes:
        size: Which size, by its name in a block config.
        field: The config field, dotted if it is in a config of its own (`ffn_config.moe_num_experts`).
        marks: Where the size shows in the layer.
        tied: Where it shows besides: in the shared expert, if that is as wide as the routed ones.
    """

    size: str
    field: str
    marks: tuple[Mark, ...]
    tied: tuple[Mark, ...] = ()


class LayerFields:
    """Finds the fields of one layer.

    Args:
        config: Of the whole model.
        index: Of the layer.
        kind: How the layer works.
        build: Builds the layer on meta with some attributes of the config overridden.
        given: What the config of the layer is to say besides, by field.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        index: int,
        kind: LayerKind,
        build: Callable[[Mapping[str, Any]], nn.Module],
        given: Mapping[str, int] | None = None,
    ) -> None:
        self.config, self.index, self._kind, self._build = config, index, kind, build
        self.given = dict(given or {})
        self._attention = tuple(f"{part.name}." for part in kind.attention)
        self._ffn = tuple(f"{part.name}." for part in kind.ffn)
        self._found: dict[str, SizeField | None] = {}

    def beside(self, given: Mapping[str, int]) -> LayerFields:
        """Return the fields of the same layer with other sizes: where sizes share a tensor, marks move."""
        return LayerFields(self.config, self.index, self._kind, self._build, {**self.given, **given})

    def find(self, size: str) -> SizeField | None:
        """Return the field that says a size of this layer, or None if the layer has no such size."""
        if size not in self._found:
            known = (field for field in _FIELDS[size] if field_value(self.config, field, self.index)[0])
            self._found[size] = next(filter(None, (self._try(size, field) for field in known)), None)
        return self._found[size]

    def base_value(self, field: str) -> int | None:
        """Return what the config says for this layer."""
        value = self.given.get(field, field_value(self.config, field, self.index)[1])
        return value if isinstance(value, int) else None

    def says(self, size: str, value: int) -> bool:
        """Whether a value only repeats what the config says of all layers, under any of the size's names.

        Families without KV heads of their own have one for each query head.
        """
        said = {self.base_value(field) for field in _FIELDS[size]} - {None}
        if size == KV_HEADS and not said:
            said = {self.base_value(field) for field in _FIELDS[QUERY_HEADS]} - {None}
        return value in said

    def _try(self, size: str, field: str) -> SizeField | None:
        if self.base_value(field) == 0:  # there is none of it: another value would make another layer
            return None
        sizes = self._trial_sizes(size, field)
        try:
            layers = [
                self._build(overridden(self.config, self._said(size, field, n), self.index)) for n in sizes
            ]
        except (ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError):
            return None  # the family does not build with another value
        look = numbers_of if size == TOP_K else sides_of
        first, second = (look(layer) for layer in layers)
        if size == TOP_K:  # other numbers are computed of it, and may move as they like
            same = {name for name in first if (first[name], second.get(name)) == ((sizes[0],), (sizes[1],))}
            first = {name: first[name] for name in same}
            second = {name: second[name] for name in same}
        marks = find_marks(first, second, sizes)
        if size == QUERY_HEADS and marks and not self._are_heads_free(layers, marks):
            return None
        return self._accept(size, field, marks) if marks else None

    def _are_heads_free(self, layers: list[nn.Module], marks: tuple[Mark, ...]) -> bool:
        """Whether layers with other query heads run, and keep what scales the scores.

        Tensors alone do not tell: an output projection or a norm may be made for the heads of the config.
        """
        if fractions_of(layers[0]) != fractions_of(layers[1]) or not any(mark.side for mark in marks):
            return False
        # a descriptor derived from other sizes cannot try it, nor one whose models complete their layers
        return not self._kind.calls.fit(self._build({})) or all(
            self._kind.calls.fit(layer) for layer in layers
        )

    def moves(self, field: str) -> bool:
        """Whether a field that the config says moves a tensor of this layer (deepseek_v4 ignores one)."""
        value = self.base_value(field)
        if not value:
            return False
        layers = (self._build(overridden(self.config, {field: n}, self.index)) for n in (value, value + 1))
        first, second = map(sides_of, layers)
        return first != second

    def _said(self, size: str, field: str, value: int) -> dict[str, int]:
        """What the config says in a trial."""
        said = {**self.given, field: value}
        if size == QUERY_HEADS:
            said |= self.pinned(value)
        return said

    def pinned(self, heads: int) -> dict[str, int]:
        """Return what the config must say beside a number of query heads: their size, which stays.

        Where the KV heads have no tensor of their own (latent attention), they are as many as the query
        heads, and follow them.
        """
        said = {}
        head_dim = self._head_dim()
        if head_dim is not None:
            said["head_dim"] = head_dim
        if self.has_kv_in_step():
            said["num_key_value_heads"] = heads
        return said

    def has_kv_in_step(self) -> bool:
        """Whether the config says as many KV heads as query heads, and no tensor has rows of them alone."""
        kv_heads = self.base_value(KV_HEADS)
        return kv_heads is not None and kv_heads == self.query_heads and self.find(KV_HEADS) is None

    def _head_dim(self) -> int | None:
        value = self.base_value("head_dim")
        if value is not None:
            return value
        hidden, heads = self.base_value("hidden_size"), self.query_heads
        return hidden // heads if hidden and heads and hidden % heads == 0 else None

    @property
    def query_heads(self) -> int | None:
        """The query heads of the config itself."""
        values = (field_value(self.config, name, self.index)[1] for name in _FIELDS[QUERY_HEADS])
        return next((value for value in values if isinstance(value, int)), None)

    def _trial_sizes(self, size: str, field: str) -> tuple[int, int]:
        if size == TOP_K:
            return 1, 2
        if size == KV_HEADS:
            heads = (self.base_value(name) for name in _FIELDS[QUERY_HEADS])
            return 1, next((n for n in heads if n is not None and n > 1), 2)
        if size == QUERY_HEADS:
            kv_heads = self._kv_heads()
            return kv_heads, 2 * kv_heads
        some = self.base_value(field) or _SOME_SIZE
        return some, 2 * some

    def _kv_heads(self) -> int:
        """The KV heads beside which query heads are tried: those that the config says, 1 if they follow."""
        found = None if self.has_kv_in_step() else self.find(KV_HEADS)
        return (found and self.base_value(found.field)) or 1

    def _accept(self, size: str, field: str, marks: tuple[Mark, ...]) -> SizeField | None:
        """Return the field if what it moves is the size in question, and nothing else."""
        heads = size in (QUERY_HEADS, KV_HEADS)
        if not all(mark.tensor.startswith(self._attention if heads else self._ffn) for mark in marks):
            return None
        if not heads and any(mark.offset for mark in marks):
            return None
        if heads or size == EXPERTS:
            return SizeField(size, field, marks)
        experts = self.find(EXPERTS)
        if size == TOP_K:
            return SizeField(size, field, marks) if experts else None
        of_experts = {mark.tensor for mark in experts.marks} if experts else set()
        routed = tuple(mark for mark in marks if mark.tensor in of_experts)
        others = tuple(mark for mark in marks if mark.tensor not in of_experts)
        if size == EXPERT_WIDTH:
            return SizeField(size, field, routed, tied=others) if routed else None
        if routed or (size == SHARED_WIDTH and experts is None):
            return None
        return SizeField(size, field, others)


def field_value(config: PreTrainedConfig, field: str, index: int) -> tuple[bool, Any]:
    """Return whether a config has a field, and its value for one layer."""
    owner, _, name = field.rpartition(".")
    holder = getattr(config, owner, None) if owner else config
    if holder is None or not hasattr(holder, name):
        return False, None
    value = getattr(holder, name)
    return True, value[index] if isinstance(value, (list, tuple)) and index < len(value) else value


def overridden(config: PreTrainedConfig, values: Mapping[str, int], index: int) -> dict[str, Any]:
    """Return the attributes of a config that say other sizes for one layer.

    Args:
        config: Of the whole model; it is not changed.
        values: By field.
        index: Of the layer: in a field that lists a value a layer, only its own is exchanged.
    """
    attributes: dict[str, Any] = {}
    for field, value in values.items():
        owner, _, name = field.rpartition(".")
        holder = config
        if owner:
            holder = attributes.setdefault(owner, copy.copy(getattr(config, owner)))
        said: Any = value
        listed = getattr(holder, name, None)
        if isinstance(listed, (list, tuple)):
            said = type(listed)([*listed[:index], value, *listed[index + 1 :]])
        if owner:
            setattr(holder, name, said)
        else:
            attributes[name] = said
    return attributes
