"""Text from token ids: ``mlx_lm``'s generation step, streamed as events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from node.events import TokensGenerated
from node.spec import Generate


class _Superseded(Exception):
    """Nobody waits for this answer any more."""


def generate(model: nn.Module, request: Generate, superseded: Callable[[], bool]) -> Iterator[TokensGenerated]:
    """Continue a prompt token by token; the last event says why it ended.

    Args:
        model: what continues it.
        request: the prompt, and how to sample. With ``max_tokens`` 0 the last event comes at once.
        superseded: whether to stop early, without a last event.
    """
    model.eval()
    mx.random.seed(request.seed)
    began = time.perf_counter()
    first: float | None = None
    count, finished = 0, "length"
    with contextlib.suppress(_Superseded), contextlib.closing(_steps(model, request, superseded)) as tokens:
        for token in tokens:
            first = first or time.perf_counter()
            if token in request.stop:
                finished = "stop"
                break
            count += 1
            yield TokensGenerated(request.id, np.array([token], np.int32))
    if superseded():
        return
    ended = time.perf_counter()
    first = first or ended
    # The first token belongs to the prompt's time; the one that ended the text was computed too.
    timed = count - 1 + (finished == "stop")
    yield TokensGenerated(
        request.id,
        np.zeros(0, np.int32),
        finished,
        tokens_per_second=timed / max(ended - first, 1e-9) if timed > 0 else 0.0,
        prompt_tokens_per_second=len(request.prompt) / max(first - began, 1e-9),
    )


def _steps(model: nn.Module, request: Generate, superseded: Callable[[], bool]) -> Generator[int, None, None]:
    """The tokens that the model gives, stop tokens included, until nobody waits for them."""
    if request.max_tokens == 0:
        return

    def check(_done: int = 0, _total: int = 0) -> None:
        if superseded():
            raise _Superseded

    steps = generate_step(
        mx.array(np.array(request.prompt, np.int32)),
        model,
        max_tokens=request.max_tokens,
        sampler=make_sampler(request.temperature, top_p=request.top_p, top_k=request.top_k, min_p=request.min_p),
        logits_processors=make_logits_processors(None, request.repetition_penalty or None, request.repetition_context),
        prompt_progress_callback=check,
    )
    with contextlib.closing(steps):
        for token, _ in steps:
            check()
            yield int(token)
