"""Text from token ids: ``mlx_lm``'s generation step, streamed as events."""

from __future__ import annotations

import time
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from node.events import TokensGenerated
from node.spec import Generate


def generate(model: nn.Module, request: Generate) -> Iterator[TokensGenerated]:
    """Continue a prompt token by token; the last event says why it ended."""
    model.eval()
    mx.random.seed(request.seed)
    sampler = make_sampler(request.temperature, top_p=request.top_p, top_k=request.top_k, min_p=request.min_p)
    penalty = request.repetition_penalty or None
    processors = make_logits_processors(None, penalty, request.repetition_context)
    began = time.perf_counter()
    first: float | None = None
    count, finished = 0, "length"
    prompt = mx.array(np.array(request.prompt, np.int32))
    steps = generate_step(prompt, model, max_tokens=request.max_tokens, sampler=sampler, logits_processors=processors)
    for token, _ in steps:
        first = first or time.perf_counter()
        if int(token) in request.stop:
            finished = "stop"
            break
        count += 1
        yield TokensGenerated(request.id, np.array([int(token)], np.int32))
    steps.close()
    ended = time.perf_counter()
    first = first or ended
    yield TokensGenerated(
        request.id,
        np.zeros(0, np.int32),
        finished,
        tokens_per_second=count / max(ended - first, 1e-9) if count else 0.0,
        prompt_tokens_per_second=len(request.prompt) / max(first - began, 1e-9),
    )
