"""The loss of a data set: chunks go to the workers a few ahead, their sums are added in chunk order."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable

from coordinator.shares import Evaluation
from node.events import EvalDone, Event
from node.spec import Evaluate

CHUNKS_AHEAD = 4


async def sum_losses(
    evaluation: Evaluation,
    first_chunk: int,
    send: Callable[[int, Evaluate], Awaitable[None]],
    receive: Callable[[], Awaitable[tuple[int, Event]]],
    *,
    workers: int = 1,
    advance: Callable[[int, int], None],
    pass_on: Callable[[int, Event], Awaitable[None]],
    sums: dict[int, EvalDone] | None = None,
) -> tuple[float, int]:
    """Sum of losses and number of target tokens.

    No worker waits for another: who is done with a chunk gets the next one.

    Args:
        evaluation: the rows.
        first_chunk: number of the first chunk; answers to lower ones are of an evaluation that was given up.
        send: to a worker, by number.
        receive: the next event of any, with the worker's number.
        workers: how many there are.
        advance: told how many chunks are done, of how many.
        pass_on: takes the events that are no answers.
        sums: of chunks, by their index, that are known already; those that are measured are added to it.
    """
    sums = {} if sums is None else sums
    left = deque(chunk for chunk in range(len(evaluation)) if chunk not in sums)
    waiting = [0] * workers
    while len(sums) < len(evaluation):
        while left and min(waiting) < CHUNKS_AHEAD:
            worker, chunk = waiting.index(min(waiting)), left.popleft()
            await send(worker, Evaluate(first_chunk + chunk, evaluation.chunk(chunk)))
            waiting[worker] += 1
        worker, event = await receive()
        if isinstance(event, EvalDone) and event.chunk >= first_chunk:
            sums[event.chunk - first_chunk] = event
            waiting[worker] -= 1
            advance(len(sums), len(evaluation))
        else:
            await pass_on(worker, event)
    ordered = [sums[chunk] for chunk in sorted(sums)]
    return math.fsum(done.loss_sum for done in ordered), sum(done.tokens for done in ordered)
