"""How often something is timed until its mean is known."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

STEADY_TIMES = 3
STEADY_SECONDS = 0.2
"""Before that a processor may not have come up to its speed."""
STEADY_ERROR = 0.03


def timed(once: Callable[[], float], repeats: int, seconds: float) -> tuple[float, ...]:
    """Time something again and again.

    Args:
        once: does it, and gives its seconds.
        repeats: how often at least.
        seconds: for how long; less where the times agree so well that more would hardly change their mean.

    Returns:
        The seconds of each time.
    """
    found: list[float] = []
    while len(found) < repeats or (sum(found) < seconds and not _steady(found)):
        found.append(once())
    return tuple(found)


def _steady(seconds: list[float]) -> bool:
    if len(seconds) < STEADY_TIMES or sum(seconds) < STEADY_SECONDS:
        return False
    error = statistics.stdev(seconds) / math.sqrt(len(seconds))
    return error < STEADY_ERROR * statistics.fmean(seconds)
