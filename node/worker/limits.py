"""How much memory MLX wires, and how much of what it has freed it keeps."""

from __future__ import annotations

import os

import mlx.core as mx

from node.owner import MEMORY_LIMIT

CACHED_PART = 0.25
"""Of what a job may use. Left to itself MLX keeps what it frees until nearly all memory is taken: on rows of many
lengths that climbs over hours, and other programs are swapped out first."""


def bound_memory() -> None:
    """Keep the model wired on a GPU, and keep to what the machine's owner allows (``node serve --max-memory``)."""
    allowed = int(os.environ.get(MEMORY_LIMIT, "0"))
    if allowed:
        mx.set_memory_limit(allowed)
    if mx.default_device().type != mx.gpu:
        return
    recommended = int(mx.device_info().get("max_recommended_working_set_size", 0))
    room = min(filter(None, (allowed, recommended)), default=0)
    if recommended:
        mx.set_wired_limit(room)
    if room:
        mx.set_cache_limit(int(CACHED_PART * room))
