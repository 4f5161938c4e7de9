"""The loop of generating over the stages: every micro-batch through every step.

The last stage samples, and sends the token ids to all other ranks; the sign bit of an id says that its row
ends there. The others learn of a token one step later, before they run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import BaseStreamer

from sharded_ckpt.pipeline.cache import with_room
from sharded_ckpt.pipeline.sampling import Sampler
from sharded_ckpt.pipeline.wire import Arrival

if TYPE_CHECKING:
    from sharded_ckpt.pipeline.connected_stage import ConnectedStage


def decode(parts: Sequence[Part], stage: ConnectedStage, stream: Stream) -> torch.Tensor:
    """Take all micro-batches through all steps, and return the prompts with what follows."""
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


def _prefill(parts: Sequence[Part], stage: ConnectedStage, stream: Stream) -> None:
    jobs = [(part, *bounds) for part in parts for bounds in part.chunks]
    asked = stage.expecting([(part.rows, end - start) for part, start, end in jobs])
    for part, start, end in jobs:
        next(asked)
        part.prompt(start, end)
        if stage.is_last and end == part.length:
            stream.add(part.choose())


class Part:
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
        stage: ConnectedStage,
        input_ids: torch.Tensor,
        others: dict[str, Any],
        sampler: Sampler,
        chunk: int | None,
    ) -> None:
        self._stage, self.input_ids, self.sampler, self._chunk = stage, input_ids, sampler, chunk
        self._others = {name: with_room(value) for name, value in others.items()}
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


class Stream:
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
