"""What of a reduction is over when a gradient's last numbers are known."""

from __future__ import annotations

from collections.abc import Sequence

FORWARD = 1 / 2
"""Of computing a micro-batch, before any gradient is known. Above frozen weights the way back costs as much as the way
there; where all weights are trained it costs twice as much, and a little more travels meanwhile than is counted."""


def last_part(positions: Sequence[int]) -> float:
    """What part of a share its last micro-batch is, by the input positions of each; 0 of an empty one."""
    return positions[-1] / sum(positions) if positions else 0.0


def known_after(run: int, runs: int) -> float:
    """The part of a step's last micro-batch after which so many runs of its gradient are known."""
    return FORWARD + (1 - FORWARD) * run / runs


def waits(last_seconds: float, run_seconds: float, runs: int) -> float:
    """Seconds that a reduction goes on after the computing, where all ranks compute for as long.

    Args:
        last_seconds: of computing the last micro-batch.
        run_seconds: of adding up one run.
        runs: of equal size.
    """
    ended = 0.0
    for run in range(1, runs + 1):
        ended = max(ended, last_seconds * known_after(run, runs)) + run_seconds
    return ended - last_seconds
