"""How many logits exist at once: what the worker's loss does, and what estimates of memory count with."""

from __future__ import annotations

_BYTES, _FEWEST = 8 << 20, 32
# A GPU is kept busy by larger products; of 128 rows they are bound by its arithmetic, no more by reading the head.
_BYTES_ON_GPU, _FEWEST_ON_GPU = 64 << 20, 128
_MOST = 1024


def rows_at_once(vocabulary: int, *, gpu: bool) -> int:
    """Positions whose fp32 logits are computed at a time."""
    fitting = (_BYTES_ON_GPU if gpu else _BYTES) // (4 * vocabulary)
    return min(max(fitting, _FEWEST_ON_GPU if gpu else _FEWEST), _MOST)
