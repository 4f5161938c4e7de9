"""Choosing tokens on the last stage, as transformers does in one process."""

from __future__ import annotations

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)


class Sampler:
    """Chooses tokens with the processors and criteria that transformers has made.

    Args:
        processors: What changes the logits.
        criteria: What ends a row.
        config: Whether to sample, and what to pad with.
        generator: To draw from; None for torch's default one.

    Attributes:
        samples: Whether tokens are drawn.
        pads: Whether rows that have ended are padded; where no end token is known, they go on.
        pads_or_stops_together: Whether no row has to go on because others do.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        generator: torch.Generator | None,
    ) -> None:
        self._processors, self._criteria = processors, criteria
        self.samples, self._generator = config.do_sample, generator
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        lengths = (MaxLengthCriteria, MaxTimeCriteria)
        self.pads_or_stops_together = self.pads or all(isinstance(each, lengths) for each in criteria)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self._pad = ends[0] if config.pad_token_id is None else config.pad_token_id

    def choose(self, input_ids: torch.Tensor, logits: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        """Return one token a row.

        Args:
            input_ids: `(rows, tokens)`, all of them so far.
            logits: `(rows, vocabulary)` of the last token.
            ended: Which rows have ended.
        """
        scores: torch.Tensor = self._processors(input_ids, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]
        tokens = self._draw(scores.softmax(-1)) if self.samples else scores.argmax(-1)
        return torch.where(ended, self.pad(ended), tokens) if self.pads else tokens

    def has_ended(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return whether each row ends with its last token."""
        ended: torch.Tensor = self._criteria(input_ids, None)
        return ended

    def pad(self, ended: torch.Tensor) -> torch.Tensor:
        """Return what rows that have ended get."""
        return torch.full_like(ended, self._pad, dtype=torch.int64)

    def skip(self, logits: torch.Tensor) -> None:
        """Draw for rows that have ended, so that the tokens of the others do not depend on it."""
        if self.samples:
            self._draw(torch.ones_like(logits, dtype=torch.float32))

    def _draw(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(weights, num_samples=1, generator=self._generator).squeeze(1)
