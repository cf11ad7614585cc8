"""The loss of a data set: chunks go to a worker a few ahead, their sums are added in chunk order."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

from coordinator.shares import Evaluation
from node.events import EvalDone, Event
from node.spec import Evaluate

CHUNKS_AHEAD = 4


async def sum_losses(
    evaluation: Evaluation,
    first_chunk: int,
    send: Callable[[Evaluate], Awaitable[None]],
    receive: Callable[[], Awaitable[Event]],
    *,
    advance: Callable[[int, int], None],
    pass_on: Callable[[Event], None],
) -> tuple[float, int]:
    """Sum of losses and number of target tokens.

    Args:
        evaluation: the rows.
        first_chunk: number of the first chunk; answers to lower ones are of an evaluation that was given up.
        send: to the worker.
        receive: its next event.
        advance: told how many chunks are done, of how many.
        pass_on: takes the events that are no answers.
    """
    sums: dict[int, EvalDone] = {}
    sent = 0
    while len(sums) < len(evaluation):
        while sent < len(evaluation) and sent - len(sums) < CHUNKS_AHEAD:
            await send(Evaluate(first_chunk + sent, evaluation.chunk(sent)))
            sent += 1
        event = await receive()
        if isinstance(event, EvalDone) and event.chunk >= first_chunk:
            sums[event.chunk] = event
            advance(len(sums), len(evaluation))
        else:
            pass_on(event)
    ordered = [sums[chunk] for chunk in sorted(sums)]
    return math.fsum(done.loss_sum for done in ordered), sum(done.tokens for done in ordered)
