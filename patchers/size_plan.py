"""What a layer's config must say so that the layer has the sizes of its block config, and where they show."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NoReturn

from torch import nn

from patchers.base_sizes import SHARED_EXPERT_COUNTS
from patchers.block_config import AttentionConfig, BlockConfig, FFNConfig, MoEConfig
from patchers.errors import FamilyError, PatchError
from patchers.size_fields import (
    EXPERT_WIDTH,
    EXPERTS,
    KV_HEADS,
    QUERY_HEADS,
    SHARED_WIDTH,
    TOP_K,
    WIDTH,
    LayerFields,
    SizeField,
)
from patchers.size_marks import Mark, numbers_of, sides_of, sizes_in

# NVIDIA's package writes this width of the shared expert for families that have none.
_NO_SHARED_EXPERT = (None, 0, 8192)


@dataclass
class SizePlan:
    """How one layer comes to its sizes.

    Attributes:
        values: What its config must say, by config field.
        shown: Of each size, what is asked for and where it must show in the built layer.
        has_other_kv_heads: Whether the KV heads are others than the config says.
    """

    values: dict[str, int] = field(default_factory=dict)
    shown: dict[str, tuple[int, tuple[Mark, ...]]] = field(default_factory=dict)
    has_other_kv_heads: bool = False

    def ask(self, found: SizeField, value: int) -> None:
        """Have a field say a value."""
        self.values[found.field] = value
        self.shown[found.size] = value, found.marks

    def check(self, layer: nn.Module, index: int) -> None:
        """Compare a built layer with the plan.

        Raises:
            PatchError: The layer does not have a size that was asked for.
        """
        sides = {**numbers_of(layer), **sides_of(layer)} if self.shown else {}
        for size, (asked, marks) in self.shown.items():
            made = sizes_in(sides, marks)
            if made != {asked}:
                built = " and ".join(f"{n:g}" if n is not None else "none" for n in made) or "none"
                raise PatchError(
                    f"block {index} asks for {size}={asked}, but {type(layer).__name__} built {built}: its "
                    f"family does not honour {size} layer by layer"
                )


def plan_sizes(block: BlockConfig, fields: LayerFields, family: str, index: int) -> SizePlan:
    """Find out what a layer's config must say for a block.

    Raises:
        FamilyError: The layer has no such size, or its family cannot say it for one layer alone.
    """
    return _Planner(fields, family, index).plan(block)


class _Planner:
    def __init__(self, fields: LayerFields, family: str, index: int) -> None:
        self.fields, self.family, self.index = fields, family, index
        self.result = SizePlan()

    def plan(self, block: BlockConfig) -> SizePlan:
        self._attention(block.attention)
        if block.ffn.moe is not None:
            self._experts(block.ffn.moe)
        else:
            self._dense(block.ffn)
        return self.result

    def _attention(self, attention: AttentionConfig) -> None:
        heads, kv_heads = attention.num_attention_heads, attention.num_key_value_heads
        fields = self.fields
        if heads is not None:
            fields = self._query_heads(heads, kv_heads)
        found = None if kv_heads is None else fields.find(KV_HEADS)
        if kv_heads is not None and found is not None:
            self.result.ask(found, kv_heads)
            self.result.has_other_kv_heads = kv_heads != self.fields.base_value(found.field)
        elif kv_heads is not None and not fields.says(KV_HEADS, kv_heads):
            self._refuse(
                f"num_key_value_heads={kv_heads}", "no config field moves the KV heads of this layer"
            )

    def _query_heads(self, heads: int, kv_heads: int | None) -> LayerFields:
        """Ask for query heads, and return the fields of a layer that has them."""
        own = self.fields.find(KV_HEADS)
        there = kv_heads or (self.fields.base_value(own.field) if own else None)
        if there and heads % there:
            self._refuse(
                f"num_attention_heads={heads}",
                f"this layer has {there} KV heads, which do not divide them: say num_key_value_heads too",
            )
        beside = {} if own is None or kv_heads is None else {own.field: kv_heads}
        found = self.fields.beside(beside).find(QUERY_HEADS)
        if found is None and self.fields.says(QUERY_HEADS, heads):
            return self.fields
        if found is None:
            self._refuse(
                f"num_attention_heads={heads}",
                "no config field moves the query heads of this layer while each keeps its size",
            )
        self.result.ask(found, heads)
        pinned = self.fields.pinned(heads)
        self.result.values.update(pinned)
        return self.fields.beside({found.field: heads, **pinned})

    def _dense(self, ffn: FFNConfig) -> None:
        width = ffn.intermediate_size
        found = None if width is None else self.fields.find(WIDTH)
        if width is None:
            return
        if found is not None:
            self.result.ask(found, width)
        elif self.fields.find(EXPERTS):
            self._refuse(
                f"intermediate_size={width}",
                "this layer is a mixture of experts: say the width of its experts, "
                "ffn.moe.expert_intermediate_dim",
            )
        elif not self.fields.says(WIDTH, width):
            self._refuse(f"intermediate_size={width}", "no config field moves the FFN width of this layer")

    def _experts(self, moe: MoEConfig) -> None:
        asked = {EXPERTS: moe.num_local_experts, TOP_K: moe.num_experts_per_tok}
        experts = self.fields.find(EXPERTS)
        if experts is None:
            self._refuse("experts (ffn.moe)", "this layer is no mixture of experts")
        for size, value in asked.items():
            found = self.fields.find(size)
            if value is not None and found is None and not self.fields.says(size, value):
                self._refuse(f"{size}={value}", f"no config field moves {size} of this layer")
            elif value is not None and found is not None:
                self.result.ask(found, value)
        self._check_groups(experts, moe)
        self._expert_widths(moe)

    def _expert_widths(self, moe: MoEConfig) -> None:
        width, shared = moe.expert_intermediate_dim, moe.shared_expert_intermediate_dim
        routed, own = self.fields.find(EXPERT_WIDTH), self.fields.find(SHARED_WIDTH)
        if width is not None:
            if routed is None:
                self._refuse(
                    f"expert_intermediate_dim={width}", "no config field moves the width of its experts"
                )
            self.result.ask(routed, width)
        if own is not None and shared is not None:
            self.result.ask(own, shared)
        elif own is None and routed is not None and routed.tied:
            self._tied_shared_expert(routed, width, shared)
        elif own is None and shared not in _NO_SHARED_EXPERT:
            self._refuse(f"shared_expert_intermediate_dim={shared}", "this layer has no shared expert")

    def _tied_shared_expert(self, routed: SizeField, width: int | None, shared: int | None) -> None:
        """Keep the shared expert at its own width where the family makes it a multiple of the routed ones."""
        base = self.fields.base_value(routed.field)
        counter = next((name for name in SHARED_EXPERT_COUNTS if self.fields.moves(name)), None)
        count = self.fields.base_value(counter) if counter else 1
        if base is None or count is None or (width is None and shared is None):
            return
        shared, width = count * base if shared is None else shared, width or base
        if shared % width or not shared or (counter is None and shared != width):
            self._refuse(
                f"expert_intermediate_dim={width} beside shared_expert_intermediate_dim={shared}",
                "the shared expert is as wide as a routed one"
                if counter is None
                else f"the width of the shared expert is {counter} times that of a routed one",
            )
        if counter is not None:
            self.result.values[counter] = shared // width
        marks = tuple(replace(mark, slope=mark.slope // count) for mark in routed.tied)
        self.result.shown[SHARED_WIDTH] = shared, marks

    def _check_groups(self, experts: SizeField, moe: MoEConfig) -> None:
        """Groups of experts (deepseek_v3) have one size, and enough of them are looked at."""
        groups = self.fields.base_value("n_group") or 1
        count = moe.num_local_experts or self.fields.base_value(experts.field) or 0
        if count % groups:
            self._refuse(
                f"num_local_experts={count}",
                f"its experts come in n_group={groups} groups of one size, so their number must be a "
                "multiple of that",
            )
        top_k = self.fields.find(TOP_K)
        visited = moe.num_experts_per_tok or (self.fields.base_value(top_k.field) if top_k else None) or 0
        reachable = (self.fields.base_value("topk_group") or groups) * count // groups
        if visited > reachable:
            self._refuse(
                f"num_local_experts={count}",
                f"a token looks at {reachable} of them (topk_group) and must visit {visited}",
            )

    def _refuse(self, asked: str, why: str) -> NoReturn:
        raise FamilyError(f"block {self.index} asks for {asked}, but in {self.family} {why}")
