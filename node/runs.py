"""In how many runs a gradient travels while the rest of it is computed: what the worker does, and plans count with."""

from __future__ import annotations

BUCKET_FLOATS = 64 << 20
"""Most numbers that are added up at once."""
MOST_RUNS = 4
LEAST_RUN_FLOATS = 256 << 10
"""None is smaller, so that a sum's latency is little beside what it saves."""


def run_count(numbers: int) -> int:
    """Of a gradient of so many numbers; 1 where it travels when all of it is known."""
    return 1 if numbers > BUCKET_FLOATS else max(1, min(MOST_RUNS, numbers // LEAST_RUN_FLOATS))
