"""Hidden states from one stage to the next, asked for before they are needed.

What they look like (shape, dtype) depends on the family: some put a dimension before the batch, some go on in
float32. So the sender says it once for each shape of `input_ids`, and both sides remember.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

import torch

from patchers.errors import CollectiveError
from sharded_ckpt.pipeline.wire import Arrival, Wire

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST_DIMENSIONS = 8
_FORM_SHAPE = (2 + _MOST_DIMENSIONS,)

Form = tuple[torch.dtype, tuple[int, ...]]


class HopOut:
    """The way to the next stage."""

    def __init__(self, wire: Wire, to: int) -> None:
        self._wire, self._to = wire, to
        self._forms: dict[Hashable, Form] = {}

    def send(self, key: Hashable, hidden_states: torch.Tensor) -> None:
        """Send hidden states, which must not be changed any more.

        Args:
            key: What their form depends on; the same on both sides.
            hidden_states: Of any shape.

        Raises:
            CollectiveError: They have another form than those of this key before.
            ConnectionCutError: The next stage is gone.
        """
        form = hidden_states.dtype, tuple(hidden_states.shape)
        if key not in self._forms:
            self._forms[key] = form
            self._wire.send(_told(form), self._to)
        if form != self._forms[key]:
            raise CollectiveError(
                f"hidden states of inputs {key} were {self._forms[key]} before, now they are {form}; where a "
                "shard was cast to another dtype, make a new PipelineStage of it on all ranks"
            )
        self._wire.send(hidden_states, self._to)


class HopIn:
    """The way from the stage before."""

    def __init__(self, wire: Wire, source: int) -> None:
        self._wire, self._source = wire, source
        self._forms: dict[Hashable, Form] = {}
        self._expected: deque[Hashable] = deque()
        self._asked: deque[Arrival] = deque()

    def expect(self, key: Hashable) -> None:
        """Ask for the hidden states of a pass, as far as their form is known; they arrive in this order."""
        self._expected.append(key)
        self._ask()

    def take(self) -> torch.Tensor:
        """Wait for the first hidden states that are expected.

        Raises:
            ConnectionCutError: They did not come in time, or the stage before is gone.
        """
        if not self._asked:
            told = self._wire.ask(_FORM_SHAPE, torch.int64, self._source).wait()
            self._forms[self._expected[0]] = _understood(told)
            self._ask()
        self._expected.popleft()
        return self._asked.popleft().wait()

    def _ask(self) -> None:
        for key in list(self._expected)[len(self._asked) :]:
            if key not in self._forms:
                return  # first comes its form, and nothing may be asked for before it
            dtype, shape = self._forms[key]
            self._asked.append(self._wire.ask(shape, dtype, self._source))


def send_described(wire: Wire, tensor: torch.Tensor, to: int) -> None:
    """Send a tensor of which the receiver knows nothing."""
    wire.send(_told((tensor.dtype, tuple(tensor.shape))), to)
    wire.send(tensor, to)


def receive_described(wire: Wire, source: int) -> torch.Tensor:
    """Wait for a tensor that is sent by `send_described`."""
    dtype, shape = _understood(wire.ask(_FORM_SHAPE, torch.int64, source).wait())
    return wire.ask(shape, dtype, source).wait()


def _told(form: Form) -> torch.Tensor:
    dtype, shape = form
    numbers = [_DTYPES.index(dtype), len(shape), *shape]
    return torch.tensor(numbers + [0] * (_FORM_SHAPE[0] - len(numbers)))


def _understood(told: torch.Tensor) -> Form:
    dtype, dimensions, *shape = told.tolist()
    return _DTYPES[dtype], tuple(shape[:dimensions])
