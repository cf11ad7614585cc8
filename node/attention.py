"""How many queries attend at once: what the worker computes, and what estimates of memory count with."""

from __future__ import annotations

# A GPU is kept busy by larger products; on a CPU they are efficient as soon as this.
_QUERIES, _QUERIES_ON_GPU = 64, 512


def query_parts(length: int, *, gpu: bool) -> list[tuple[int, int]]:
    """Where parts of the queries of a row begin and end, all of about one size; one part where more do not pay."""
    count = max(1, length // (_QUERIES_ON_GPU if gpu else _QUERIES))
    ends = [length * (part + 1) // count for part in range(count)]
    return list(zip([0, *ends[:-1]], ends, strict=True))
