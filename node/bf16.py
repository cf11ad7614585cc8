"""Numbers as bf16, the upper half of fp32: half of the bytes on the wire, and what rounding keeps back is paid later.

Error feedback: what rounding took from a number is added to the one that stands in its place the next time, so sums
over many steps are off by one rounding, not by one for each step (Karimireddy et al. 2019, arXiv 1901.09847).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]
"""The bits of bf16 numbers."""

_NOT_A_NUMBER = 0x7FC0


def rounded(numbers: Floats) -> Halves:
    """The nearest bf16 numbers, of two that are as near the even one."""
    bits = numbers.view(np.uint32)
    halves = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    halves[np.isnan(numbers)] = _NOT_A_NUMBER
    return halves


def widened(halves: Halves) -> Floats:
    """The same numbers as fp32."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def rounded_with_feedback(numbers: Floats, owed: Floats) -> Halves:
    """These numbers and what is owed of them, rounded; ``owed`` becomes what that has kept back.

    What is not finite owes nothing: it would spoil every step after it.
    """
    with np.errstate(all="ignore"):
        due = numbers + owed
        halves = rounded(due)
        kept_back = due - widened(halves)
    owed[:] = np.where(np.isfinite(kept_back), kept_back, 0)
    return halves
