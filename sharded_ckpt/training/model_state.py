"""The state of a model, or of the parts of one that are on this rank, under global names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchers.errors import CheckpointError, ConfigError
from patchers.names import fold
from sharded_ckpt.checkpoint.coordinator import Solo
from sharded_ckpt.ties import others_of, partners_of
from sharded_ckpt.training.adapters import adapter_tensors, base_name, is_adapter_name, made_by_peft
from sharded_ckpt.training.audit import (
    FillPlan,
    FillReport,
    StrictHandling,
    Wanted,
    audit_keys,
    plan_fill,
    spec_of,
)
from sharded_ckpt.training.key_names import PEFT_PREFIX
from sharded_ckpt.training.module_kinds import _has_quantized_params
from sharded_ckpt.training.places import (
    Place,
    by_name,
    extra_states_of,
    is_extra_state,
    parts_of,
    places_of,
    ties_said_by,
    unowned_in,
    without_extra_state,
)
from sharded_ckpt.training.tied_head import (
    _get_lm_head_weight_and_name,
    has_local_tied_lm_head,
    is_same_memory,
    is_tied_word_embeddings,
)


class ModelState:
    """A model as state: exactly the tensors that are on this rank, by their names in the whole model.

    It has the `state_dict` and `load_state_dict` that `torch.distributed.checkpoint` asks of a `Stateful`,
    and is what `save_training_state` and `load_training_state` take.

    A head that is the embedding's very memory is left out, and is filled from the embedding. One that is only
    called tied by the config, and holds values of its own, is kept.

    Args:
        model: A model, a shard of one, or a list of parts (the virtual stages of this rank).
        is_peft: Take the adapter alone, under the names that peft gives it in its files.
        is_init_step: Take the base weights alone, to be filled from a checkpoint of the base model.
        skip_task_head_prefixes: With `is_init_step`, names that begin so are left out: a head that the base
            model does not have keeps its initial values.
        cpu_offload: Whether `state_dict` copies what is on a device to the CPU.

    Raises:
        ConfigError: `model` is neither a module nor a list of some.
        CheckpointError: Two parts have different tensors of one name.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> state = ModelState(model)
        >>> saved = {name: tensor.clone() for name, tensor in state.state_dict().items()}
        >>> _ = nn.init.zeros_(model.weight)
        >>> state.load_state_dict(saved).filled, torch.equal(model.weight, saved["weight"])
        (1, True)
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        is_peft: bool = False,
        is_init_step: bool = False,
        skip_task_head_prefixes: list[str] | None = None,
        *,
        cpu_offload: bool = False,
    ) -> None:
        self.model = parts_of(model)
        self.is_peft, self.is_init_step = is_peft, is_init_step
        self.skip_task_head_prefixes = list(skip_task_head_prefixes or [])
        self.cpu_offload = cpu_offload
        self.uses_tied_lm_head = any(map(is_tied_word_embeddings, self.model))
        self._refresh_local_tied_lm_head()
        self.places()  # says now what would fail later

    @property
    def ties(self) -> dict[str, str]:
        """Which name the config ties to which, in the whole model."""
        return {} if self.is_peft else ties_said_by(self.model)

    @property
    def unowned(self) -> tuple[str, ...] | None:
        """The modules that are stubs here; None for an adapter or a base, which never are a whole model."""
        return None if self.is_peft or self.is_init_step else unowned_in(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors by name. They share memory with the model, unless `cpu_offload` moves them."""
        if self.is_init_step:
            return self._get_base_model_state_dict()
        state: dict[str, Any] = by_name(self.places())
        self._refresh_local_tied_lm_head()
        if not self.is_peft:
            self._drop_tied_head(state)
            state |= {name: said for name, (_, said) in extra_states_of(self.model).items()}
        return self._detached(state)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> FillReport:
        """Fill the model; all is compared first, so either everything is filled or nothing is.

        No rank waits for another here: across ranks use `load_training_state`. Keys of blocks that this shard
        does not own are no surprise to it.

        Args:
            state_dict: Tensors by name; it is not changed. DTensors must be spread as they are here, plain
                tensors must be whole.
            strict: Whether keys that one side lacks are errors (but for `_extra_state`).

        Returns:
            What was filled, missing, unexpected and cast.

        Raises:
            MissingKeysError: The state dict lacks tensors of the model.
            CheckpointError: It has others, or some of another shape. Nothing was filled.
        """
        if self.is_init_step:
            return self._set_base_model_state_dict(state_dict)
        return self._fill(state_dict, StrictHandling.RAISE_ALL if strict else StrictHandling.RETURN_ALL)

    # What is filled

    def places(self) -> list[Place]:
        """Return the live tensors under the names that they have in this mode."""
        if self.is_peft and not self.is_init_step:
            tensors = [pair for part in self.model for pair in adapter_tensors(part).items()]
            return _adapter_places(tensors)
        places = places_of(self.model)
        if self.is_init_step:
            places = list(filter(None, map(self._as_base, places)))
        return places

    def wanted(self, places: Sequence[Place]) -> list[Wanted]:
        """Return the live tensors as they are looked for in a checkpoint.

        Raises:
            CheckpointError: One is on meta and cannot be made real here.
        """
        for place in places:
            place.check()
        partners = partners_of(self.ties)
        return [Wanted(p.names, others_of(p.names, partners), spec_of(p.tensor)) for p in places]

    def fill(self, plan: FillPlan, places: Sequence[Place], items: Iterable[tuple[str, Tensor]]) -> int:
        """Fill the tensors that a plan feeds, and tie again what is one tensor.

        Args:
            plan: Made of what `wanted` gave for `places`.
            places: Those that `places()` gave.
            items: The tensors of the checkpoint that the plan names.

        Returns:
            How many tensors were filled.
        """
        consumers, filled = plan.consumers, 0
        for key, value in items:
            for number in consumers[key]:
                places[number].fill(value)
                filled += 1
        self._tie_again(plan, places)
        self._refresh_local_tied_lm_head()
        return filled

    def set_extra_states(self, states: Mapping[str, Any]) -> None:
        """Hand to modules the extra states that there are for them."""
        for name, (module, _) in extra_states_of(self.model).items():
            if name in states:
                module.set_extra_state(states[name])

    def _fill(self, state_dict: Mapping[str, Any], strictness: StrictHandling) -> FillReport:
        if not self.is_peft and any(map(_has_quantized_params, self.model)):
            raise ConfigError(
                "the model has modules quantised by bitsandbytes, whose weights cannot be filled one by one: "
                "let transformers load it, and its adapter with ModelState(model, is_peft=True)"
            )
        tensors = without_extra_state(state_dict)
        if odd := [key for key, value in tensors.items() if not isinstance(value, Tensor)]:
            raise CheckpointError(f"the state dict has {fold(odd)}, which are no tensors")
        specs = {key: spec_of(tensor) for key, tensor in tensors.items()}
        places = self.places()
        plan = plan_fill(self.wanted(places), specs, "the state dict")
        elsewhere = tuple(f"{name}." for name in unowned_in(self.model))
        keys = [key for key in tensors if not key.removeprefix(PEFT_PREFIX).startswith(elsewhere)]
        missing, unexpected = audit_keys(plan, keys, strictness, Solo(), "the state dict")
        refuse_unequal(plan, tensors, "the state dict")
        used = {key: tensors[key] for key in plan.consumers}
        for key, numbers in plan.consumers.items():
            for number in numbers:
                places[number].check(used[key])
        filled = self.fill(plan, places, used.items())
        self.set_extra_states(state_dict)
        return FillReport(filled, missing, unexpected, plan.cast)

    # Of the specification

    def _get_base_model_state_dict(self) -> dict[str, Any]:
        """Return the base weights: no adapter, no tied head, no task head that is to be skipped."""
        state: dict[str, Any] = by_name(self.places())
        self._refresh_local_tied_lm_head()
        self._drop_tied_head(state)
        return self._detached(state)

    def _set_base_model_state_dict(self, state_dict: Mapping[str, Any]) -> FillReport:
        """Fill the base weights with what there is for them; the report says for what there is nothing."""
        skipped = tuple(key for key in state_dict if self._is_skipped(key))
        kept = {key: value for key, value in state_dict.items() if key not in skipped}
        report = self._fill(kept, StrictHandling.RETURN_ALL)
        return FillReport(report.filled, report.missing, report.unexpected, report.cast, skipped)

    def _refresh_local_tied_lm_head(self) -> None:
        """Look again whether the head is the embedding's memory: wrappers and loads can part or join them."""
        heads = [_get_lm_head_weight_and_name(part)[1] for part in self.model]
        self.lm_head_param_name = next((name for name in heads if name is not None), None)
        self.has_local_tied_lm_head = any(map(has_local_tied_lm_head, self.model))

    def _drop_tied_head(self, state: dict[str, Any]) -> None:
        if self.has_local_tied_lm_head and self.lm_head_param_name is not None:
            state.pop(self.lm_head_param_name, None)

    def _as_base(self, place: Place) -> Place | None:
        inside = any(map(made_by_peft, self.model))
        names = tuple(name for name in place.names if not (inside and is_adapter_name(name)))
        names = tuple(base_name(name) if inside else name for name in names)
        if not inside and self.is_peft:
            names = tuple(name for name in names if "lora_" not in name)
        names = tuple(name for name in names if not self._is_skipped(name))
        return Place(names, place.tensor, place.holders) if names else None

    def _is_skipped(self, name: str) -> bool:
        return name.startswith(tuple(self.skip_task_head_prefixes))

    def _detached(self, state: Mapping[str, Any]) -> dict[str, Any]:
        detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.items()}
        if not self.cpu_offload:
            return detached
        return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in detached.items()}

    def _tie_again(self, plan: FillPlan, places: Sequence[Place]) -> None:
        """Make the head the embedding's memory where the config ties them and one key has fed both."""
        fed = {name: plan.sources[i] for i, place in enumerate(places) for name in place.names}
        for part in self.model:
            head, name = _get_lm_head_weight_and_name(part)
            source = self.ties.get(name or "")
            if head is None or name is None or source is None:
                continue
            if fed.get(source) is None or fed[source] != fed.get(name):
                continue
            holders = {other: place.holders for place in places for other in place.names}
            embedding, attribute = holders[source][0]
            kept = getattr(embedding, attribute)
            if not is_same_memory(kept, head):
                for module, attribute in holders[name]:
                    setattr(module, attribute, kept)


def refuse_unequal(plan: FillPlan, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise if keys that stand for one tensor of the model hold different values.

    Raises:
        CheckpointError: They do; which one is right cannot be known.
    """
    for group in plan.equal:
        first, *rest = (tensors[key] for key in group)
        if not all(is_same_memory(first, other) or torch.equal(first, other) for other in rest):
            raise CheckpointError(
                f"{where}: {', '.join(group)} are one tensor in this model, and hold different values there. "
                "Were they trained apart? Set tie_word_embeddings to false to load both; nothing was loaded"
            )


def _adapter_places(tensors: Sequence[tuple[str, Tensor]]) -> list[Place]:
    counts = Counter(name for name, _ in tensors)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise CheckpointError(f"two parts of the model have adapters called {fold(twice)}")
    return [Place((name,), tensor) for name, tensor in tensors if not is_extra_state(name)]
