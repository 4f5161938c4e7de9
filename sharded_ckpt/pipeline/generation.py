"""Generating text over the stages: transformers prepares, and its processors and criteria choose and stop.

`generate` of transformers takes the loop as an argument (`custom_generate`). So the generation config, the
logits processors, the stopping criteria, masks, positions and the cache are its own, whatever the family.
It prepares each micro-batch by itself; the loop takes them through the stages one behind the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerationMode

from patchers.cache_names import CACHE_NAMES
from patchers.errors import ConfigError
from sharded_ckpt.pipeline.connected_stage import ConnectedStage
from sharded_ckpt.pipeline.decoding import Part, Stream, decode
from sharded_ckpt.pipeline.inputs import (
    MicroBatches,
    cut,
    fingerprint,
    require_runnable,
    require_token_ids,
)
from sharded_ckpt.pipeline.micro_batches import rows_of_step
from sharded_ckpt.pipeline.sampling import Sampler

_WITH_STATE = ("logits_processor", "stopping_criteria")
_REFUSED = {
    **dict.fromkeys(
        CACHE_NAMES, "makes a cache of its own for each micro-batch; give the whole text as input_ids"
    ),
    "assistant_model": "generates without help",
    "custom_generate": "is a loop of its own",
    "inputs_embeds": "runs on input_ids",
}
_OF_ALL_ROWS = frozenset(vars(GenerationConfig()))
_MORE_THAN_IDS = (
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
)


def generate(
    stage: ConnectedStage,
    inputs: torch.Tensor | None,
    micro_batches: MicroBatches,
    seed: int | None,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """Continue prompts, as transformers' `generate` prepares them. See `PipelineStage.generate`."""
    with stage.collectively("generating"), torch.no_grad():
        if stage.links is not None:
            require_runnable(options, stage.shard.config)
            told = {name: value for name, value in options.items() if name != "streamer"}
            stage.links.compare(fingerprint({"input_ids": inputs, **told}, extra=[micro_batches, seed]))
        with _somewhere(stage.shard, stage.runtime.device):
            made = _generate(stage, inputs, micro_batches, seed, options)
        stage.conclude()
    return made


def _generate(
    stage: ConnectedStage,
    inputs: torch.Tensor | None,
    micro_batches: MicroBatches,
    seed: int | None,
    options: Mapping[str, Any],
) -> torch.Tensor:
    for name in _REFUSED:
        if options.get(name) is not None:
            raise ConfigError(f"{name} cannot be given to a pipeline's generate: it {_REFUSED[name]}")
    if options.get("cache_implementation") == "paged":  # transformers would leave the loop out, too
        raise ConfigError(
            "a pipeline has no paged cache; leave out cache_implementation, or pass another one"
        )
    if options.get("token_healing") or getattr(options.get("generation_config"), "token_healing", None):
        raise ConfigError("a pipeline heals no tokens (token_healing): heal the prompts in one process first")
    prompts, options = _prompts(inputs, options)
    given, options = _expanded(stage, prompts, options)
    generator = None if seed is None else torch.Generator(stage.runtime.device).manual_seed(seed)
    batch, length = given["input_ids"].shape
    rows = rows_of_step(stage, batch, length, micro_batches)
    parts = _prepared(stage, given, rows, options, generator)
    if len(parts) > 1 and not all(part.sampler.pads_or_stops_together for part in parts):
        # rows that have ended are not padded then, but go on until the last one ends
        parts = _prepared(stage, given, [sum(rows)], options, generator)
    if batch > len(prompts) and not parts[0].sampler.samples:
        raise ConfigError("greedily, num_return_sequences would all be the same: pass do_sample=True")
    stream = Stream(options["streamer"], given["input_ids"])
    return decode(parts, stage, stream)


def _prompts(inputs: torch.Tensor | None, options: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the prompts, whichever way they were given, and the other options."""
    by_name = options.get("input_ids")
    prompts = inputs if by_name is None else by_name
    if prompts is None or (inputs is not None and by_name is not None):
        raise ConfigError("generate takes prompts as its first argument or as input_ids: give one of them")
    require_token_ids(prompts)
    return prompts, {name: value for name, value in options.items() if name != "input_ids"}


def _expanded(
    stage: ConnectedStage, inputs: torch.Tensor, options: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of every sequence that is to be made, and the options of any of them."""
    options = {"streamer": None, **_with_stop_strings(stage.shard, options)}
    configs: tuple[Any, ...] = (options.get("generation_config"), stage.shard.generation_config)
    asked = (
        options.get("num_return_sequences"),
        *(getattr(c, "num_return_sequences", None) for c in configs),
    )
    times = next((number for number in asked if number), 1)
    tensors = {
        name: value
        for name, value in options.items()
        if isinstance(value, torch.Tensor) and name not in _OF_ALL_ROWS  # several end tokens are no rows
    }
    given = {
        name: _repeated(value.to(stage.runtime.device), inputs.shape[0], times)
        for name, value in {"input_ids": inputs, **tensors}.items()
    }
    rest = {name: value for name, value in options.items() if name not in tensors}
    return given, rest if times == 1 else rest | {"num_return_sequences": 1}


def _repeated(tensor: torch.Tensor, batch: int, times: int) -> torch.Tensor:
    return tensor.repeat_interleave(times, dim=0) if tensor.shape[:1] == (batch,) else tensor


def _prepared(
    stage: ConnectedStage,
    given: Mapping[str, torch.Tensor],
    rows: Sequence[int],
    options: Mapping[str, Any],
    generator: torch.Generator | None,
) -> list[Part]:
    """Let transformers prepare each micro-batch, with processors, criteria and a cache of its own."""
    parts: list[Part] = []

    def prepared(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **others: Any,
    ) -> torch.Tensor:
        _require_plain(generation_config, others)
        if stage.links is not None and generation_config.guidance_scale not in (None, 1):
            raise ConfigError(
                "guidance_scale cannot be given to a pipeline's generate: it runs the whole model once more"
            )
        sampler = Sampler(logits_processor, stopping_criteria, generation_config, generator)
        parts.append(Part(stage, input_ids, others, sampler, generation_config.prefill_chunk_size))
        return input_ids

    whole_class: Any = type(stage.shard)  # the instance's own refuses partial shards
    for start, part in zip(accumulate(rows, initial=0), cut(given, rows), strict=False):
        own = {name: options[name] for name in _WITH_STATE if options.get(name) is not None}
        if len(rows) > 1:
            own = {name: _copied(name, value) for name, value in own.items()}
        if options.get("prefix_allowed_tokens_fn") is not None:
            own["prefix_allowed_tokens_fn"] = _counting_from(start, options["prefix_allowed_tokens_fn"])
        arguments = {**options, **own, **part, "streamer": None, "custom_generate": prepared}
        whole_class.generate(stage.shard, arguments.pop("input_ids"), **arguments)
    return parts


def _copied(name: str, value: Any) -> Any:
    """Return processors or criteria with a state of their own.

    Raises:
        ConfigError: They hold a lock, an event or the like.
    """
    try:
        return copy.deepcopy(value)
    except Exception as error:
        raise ConfigError(
            f"{name} cannot be copied, and each micro-batch needs its own ({type(error).__name__}: {error}); "
            "pass micro_batches=1"
        ) from error


def _counting_from(start: int, allowed: Callable[[int, Any], list[int]]) -> Callable[[int, Any], list[int]]:
    """Return a function of the rows of a micro-batch, given that of the rows of the batch."""
    return lambda row, input_ids: allowed(start + row, input_ids)


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
    """Give a model a parameter if it has none: transformers asks the first one where the model is.

    So it is where a rank owns nothing, or nothing but blocks of which all is removed.
    """
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
    with_cache = any(isinstance(value, Cache) for value in prepared.values())
    if config.prefill_chunk_size is not None and not with_cache:
        raise ConfigError("a prompt can be run in chunks (prefill_chunk_size) only with a cache")
