"""In which order a stage runs the micro-batches of a training step forward and backward. Pure data."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Action(NamedTuple):
    """One thing to do: run a micro-batch forward, or backward."""

    kind: Literal["forward", "backward"]
    micro_batch: int


def one_forward_one_backward(position: int, stages: int, micro_batches: int) -> list[Action]:
    """Return what one stage does in a training step (1F1B; Narayanan et al., PipeDream, 2019).

    A stage runs forward until the first micro-batch has come back, then backward and forward in turns: so no
    stage ever holds the activations of more micro-batches than there are stages behind it, and itself.

    Args:
        position: Which stage, from 0.
        stages: How many there are.
        micro_batches: How many run through them.

    Example:
        >>> "".join(kind[0] + str(number) for kind, number in one_forward_one_backward(0, 2, 3))
        'f0f1b0f2b1b2'
    """
    warm_up = min(stages - 1 - position, micro_batches)
    actions = [Action("forward", number) for number in range(warm_up)]
    for number in range(micro_batches):
        if warm_up + number < micro_batches:
            actions.append(Action("forward", warm_up + number))
        actions.append(Action("backward", number))
    return actions
