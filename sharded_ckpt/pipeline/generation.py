"""Generating text over the stages: transformers prepares, samples and stops; here is only the loop.

`generate` of transformers takes the loop as an argument (`custom_generate`). So the generation config, the
logits processors, the stopping criteria, masks, positions and the cache are its own, whatever the family.
The batch is cut into micro-batches that follow each other through the stages. The last stage samples, and
sends the token ids to all others; the sign bit of an id says that its row ends there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import BaseStreamer, GenerationMode

from patchers.errors import ConfigError
from sharded_ckpt.pipeline.cache import with_room
from sharded_ckpt.pipeline.inputs import CACHES, cut, sizes_of
from sharded_ckpt.pipeline.sampling import Sampler
from sharded_ckpt.pipeline.step_times import measured_rows
from sharded_ckpt.pipeline.wire import Arrival

if TYPE_CHECKING:
    from sharded_ckpt.pipeline.stage import PipelineStage

_WITH_STATE = ("logits_processor", "stopping_criteria")
_REFUSED = {
    "past_key_values": "makes a cache of its own for each micro-batch; give the whole text as input_ids",
    "cache_params": "makes a cache of its own for each micro-batch; give the whole text as input_ids",
    "assistant_model": "generates without help",
    "custom_generate": "is a loop of its own",
    "inputs_embeds": "runs on input_ids",
}
_MORE_THAN_IDS = (
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
)


def generate(
    stage: PipelineStage,
    inputs: torch.Tensor,
    micro_batches: int | Sequence[int] | Literal["auto"],
    seed: int | None,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """Take prompts through the stages, as transformers' `generate` prepares them; see the stage's method."""
    for name in _REFUSED:
        if options.get(name) is not None:
            raise ConfigError(f"{name} cannot be given to a pipeline's generate: it {_REFUSED[name]}")
    given, options = _expanded(stage, inputs, options)
    generator = None if seed is None else torch.Generator(stage.runtime.device).manual_seed(seed)
    batch, length = given["input_ids"].shape
    if isinstance(micro_batches, str):
        rows = measured_rows(stage, batch, length)
    else:
        rows = sizes_of(micro_batches, batch)
    parts = _prepared(stage, given, rows, options, generator)
    if len(parts) > 1 and not all(part.sampler.pads_or_stops_together for part in parts):
        # rows that have ended are not padded then, but go on until the last one ends
        parts = _prepared(stage, given, [sum(rows)], options, generator)
    stream = _Stream(options["streamer"], given["input_ids"])
    return _run(parts, stage, stream)


def _expanded(
    stage: PipelineStage, inputs: torch.Tensor, options: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of every sequence that is to be made, and the options of any of them."""
    options = {"streamer": None, **_with_stop_strings(stage.shard, options)}
    configs: tuple[Any, ...] = (options.get("generation_config"), stage.shard.generation_config)
    asked = (
        options.get("num_return_sequences"),
        *(getattr(c, "num_return_sequences", None) for c in configs),
    )
    times = next((number for number in asked if number), 1)
    tensors = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
    given = {
        name: _repeated(value.to(stage.runtime.device), inputs.shape[0], times)
        for name, value in {"input_ids": inputs, **tensors}.items()
    }
    rest = {name: value for name, value in options.items() if name not in tensors}
    return given, rest if times == 1 else rest | {"num_return_sequences": 1}


def _repeated(tensor: torch.Tensor, batch: int, times: int) -> torch.Tensor:
    return tensor.repeat_interleave(times, dim=0) if tensor.shape[:1] == (batch,) else tensor


def _prepared(
    stage: PipelineStage,
    given: Mapping[str, torch.Tensor],
    rows: Sequence[int],
    options: Mapping[str, Any],
    generator: torch.Generator | None,
) -> list[_Part]:
    """Let transformers prepare each micro-batch, with processors, criteria and a cache of its own."""
    parts: list[_Part] = []

    def prepared(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **others: Any,
    ) -> torch.Tensor:
        _require_plain(generation_config, others)
        sampler = Sampler(logits_processor, stopping_criteria, generation_config, generator)
        parts.append(_Part(stage, input_ids, others, sampler, generation_config.prefill_chunk_size))
        return input_ids

    whole_class: Any = type(stage.shard)  # the instance's own refuses partial shards
    for part in cut(given, rows):
        own = copy.deepcopy({name: options[name] for name in _WITH_STATE if name in options})
        arguments = {**options, **own, **part, "streamer": None, "custom_generate": prepared}
        with _somewhere(stage.shard, stage.runtime.device):
            whole_class.generate(stage.shard, arguments.pop("input_ids"), **arguments)
    return parts


def _with_stop_strings(model: PreTrainedModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """Make the criterion of the stop strings: transformers gives no tokenizer to a loop of one's own."""
    options = dict(options)
    config, tokenizer = options.get("generation_config"), options.pop("tokenizer", None)
    asked = options.get("stop_strings"), getattr(config, "stop_strings", None)
    strings = next((strings for strings in asked if strings), model.generation_config.stop_strings)
    if strings and tokenizer is not None:
        criteria = StoppingCriteriaList(options.get("stopping_criteria") or ())
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
        options |= {"stop_strings": None, "stopping_criteria": criteria}
        if config is not None:
            options["generation_config"] = copy.deepcopy(config)
            options["generation_config"].stop_strings = None
    return options


@contextmanager
def _somewhere(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Give a model a parameter if it has none: transformers asks the first one where the model is."""
    if next(model.parameters(), None) is not None:
        yield
        return
    model.register_parameter("nothing", torch.nn.Parameter(torch.empty(0, device=device)))
    try:
        yield
    finally:
        del model.nothing


def _require_plain(config: GenerationConfig, prepared: Mapping[str, Any]) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ConfigError(
            f"a pipeline generates greedily or by sampling; {mode.value} was asked for (num_beams, "
            "penalty_alpha, assistant_model …)"
        )
    for name in _MORE_THAN_IDS:
        if getattr(config, name, None):
            raise ConfigError(f"{name} cannot be given by a pipeline's generate, which returns token ids")
    if config.prefill_chunk_size is not None and not any(prepared.get(name) is not None for name in CACHES):
        raise ConfigError("a prompt can be run in chunks (prefill_chunk_size) only with a cache")


def _run(parts: Sequence[_Part], stage: PipelineStage, stream: _Stream) -> torch.Tensor:
    """Take all micro-batches through all steps; the other ranks hear of a token one step later."""
    _prefill(parts, stage, stream)
    if stage.is_last:
        for part in parts:
            part.expect()
    while not all(part.is_done for part in parts):
        for part in parts:
            if stage.is_last:
                part.step()
                stream.add(part.choose())
            else:
                stream.add(part.accept())
            part.expect()
            if not stage.is_last:
                part.step()
    stream.end()
    return torch.cat([part.input_ids for part in parts])


def _prefill(parts: Sequence[_Part], stage: PipelineStage, stream: _Stream) -> None:
    jobs = [(part, *bounds) for part in parts for bounds in part.chunks]
    asked = stage.expecting([(part.rows, end - start) for part, start, end in jobs])
    for part, start, end in jobs:
        next(asked)
        part.prompt(start, end)
        if stage.is_last and end == part.length:
            stream.add(part.choose())


class _Part:
    """One micro-batch on its way through the steps.

    Args:
        stage: This rank's.
        input_ids: The prompts.
        others: What transformers has prepared besides, its cache among it.
        sampler: Used on the last stage.
        chunk: How many tokens of the prompts to run at a time; None for all.
    """

    def __init__(
        self,
        stage: PipelineStage,
        input_ids: torch.Tensor,
        others: dict[str, Any],
        sampler: Sampler,
        chunk: int | None,
    ) -> None:
        self._stage, self.input_ids, self.sampler, self._chunk = stage, input_ids, sampler, chunk
        self._others = {name: with_room(value) if name in CACHES else value for name, value in others.items()}
        self.rows, self.length = input_ids.shape
        self._ended = torch.zeros(self.rows, dtype=torch.bool, device=input_ids.device)
        self._told: Arrival | None = None
        self._logits = torch.empty(0)

    @property
    def is_done(self) -> bool:
        """Whether all rows have ended."""
        return bool(self._ended.all())

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """First and last token (exclusive) of each pass over the prompts."""
        size = self._chunk or self.length
        return [(start, min(start + size, self.length)) for start in range(0, self.length, size)]

    def prompt(self, start: int, end: int) -> None:
        """Run a piece of the prompt; only the last one needs the head."""
        others, is_last = self._others, end == self.length
        if (start, end) != (0, self.length):
            mask, positions = others.get("attention_mask"), others.get("position_ids")
            others = others | {
                "attention_mask": None if mask is None else mask[:, :end],
                "position_ids": None if positions is None else positions[..., start:end],
            }
        self._run(self.input_ids[:, start:end], others, is_last, is_first_iteration=True)

    def expect(self) -> None:
        """Ask for the hidden states of the next step, unless all rows have ended."""
        if not self.is_done:
            self._stage.expect((self.rows, self._new))

    def step(self) -> None:
        """Run the last token, or all of them where there is no cache; nothing if all rows have ended."""
        if not self.is_done:
            self._run(self.input_ids, self._others, True, next_sequence_length=self._new)

    @property
    def _new(self) -> int:
        return 1 if self._others.get("use_cache") else self.input_ids.shape[1]

    def choose(self) -> torch.Tensor:
        """Choose the next token of each row, on the last stage, and tell all ranks."""
        if self.is_done:
            self.sampler.skip(self._logits)
            return self._append(self.sampler.pad(self._ended))
        tokens = self.sampler.choose(self.input_ids, self._logits, self._ended)
        self._append(tokens)
        self._ended = self._ended | self.sampler.has_ended(self.input_ids)
        if self._stage.links is not None:
            self._stage.links.tell_all(torch.where(self._ended, ~tokens, tokens))
        return tokens

    def accept(self) -> torch.Tensor:
        """Return the tokens that the last stage has chosen for the last step."""
        if self._told is None:  # all rows had ended before
            return self._append(self.sampler.pad(self._ended))
        told, self._told = self._told.wait(), None
        self._ended = told < 0
        return self._append(torch.where(self._ended, ~told, told))

    def _append(self, tokens: torch.Tensor) -> torch.Tensor:
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=-1)
        return tokens

    def _run(self, input_ids: torch.Tensor, others: dict[str, Any], head: bool, **prepare: Any) -> None:
        model: Any = self._stage.shard
        links = self._stage.links
        if self._stage.body.blocks:
            inputs = model.prepare_inputs_for_generation(input_ids, **prepare, **others)
            output = self._stage.run(inputs | {"return_dict": True}, head=head).output
            if head and self._stage.is_last:
                self._logits = output.logits[:, -1].clone()  # a view would keep all of them alive
            if head:
                self._others = model._update_model_kwargs_for_generation(output, self._others)
        if head and links is not None and not self._stage.is_last:
            self._told = links.ask_last((self.rows,), torch.int64)


class _Stream:
    """Hands the tokens of each step to a streamer, once all rows have theirs."""

    def __init__(self, streamer: BaseStreamer | None, prompts: torch.Tensor) -> None:
        self._streamer, self._batch = streamer, prompts.shape[0]
        self._tokens: list[torch.Tensor] = []
        if streamer is not None:
            streamer.put(prompts.cpu())

    def add(self, tokens: torch.Tensor) -> None:
        """Take the tokens of the next micro-batch."""
        self._tokens.append(tokens)
        if sum(map(len, self._tokens)) == self._batch:
            if self._streamer is not None:
                self._streamer.put(torch.cat(self._tokens).cpu())
            self._tokens = []

    def end(self) -> None:
        """Tell the streamer that nothing more comes."""
        if self._streamer is not None:
            self._streamer.end()
