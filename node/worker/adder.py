"""What a way of adding numbers up over the ranks of a group has to offer; ``ring.Ring`` makes a reduction of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from node.spec import RingSpec

Floats = npt.NDArray[np.float32]


class ReductionFailed(Exception):
    """There is no sum: the message says why, on one line. The group is of no more use."""


NEWER_GENERATION = "a newer generation"


@dataclass(frozen=True)
class Limit:
    """The longest that a sum may take.

    Attributes:
        until: its end, by ``time.monotonic()``.
        late: what is said then, on one line.
    """

    until: float
    late: str

    @classmethod
    def of(cls, seconds: float) -> Limit:
        """So many seconds from now."""
        return cls(time.monotonic() + seconds, f"no sum within {seconds:.0f} s")

    @classmethod
    def of_forming(cls, spec: RingSpec) -> Limit:
        """For forming a group."""
        return cls(time.monotonic() + spec.form_seconds, f"the group did not form in {spec.form_seconds:.0f} s")

    @property
    def left(self) -> float:
        """Seconds until its end, not below 0."""
        return max(0.0, self.until - time.monotonic())


@dataclass(frozen=True)
class Rounding:
    """How numbers of a gradient cross the wire as bf16; see ``node.bf16``.

    What is owed of them belongs to the group, and ends with it.

    Attributes:
        place: of the sum's first number among all that are added up in a step; 0 begins a new one.
        exact: so many numbers at the beginning of the sum go as fp32.
        settle: nothing is rounded this time, and what is owed is paid.
    """

    place: int
    exact: int
    settle: bool


class Adder(Protocol):
    """One rank's end of a group. Ends at once, with ``ReductionFailed``, when a newer generation is heard of."""

    @property
    def numbers(self) -> Floats:
        """Where numbers to add up are put, and sums are found."""

    def form(self, spec: RingSpec, layout: int) -> None:
        """Find the other ranks, and prove who they are; see ``node.reducer.proof``.

        Raises:
            ReductionFailed: the group did not form.
        """

    def begin(self, first: int, count: int, step: int, rounding: Rounding | None = None) -> None:
        """Begin to replace ``count`` numbers, from the ``first`` on, by their sums over all ranks: the same on each.

        Several sums may be under way, of different numbers, begun in the same order on all ranks. With ``rounding``,
        which is the same on all of them, too, the sums are those of numbers that were rounded on their way.

        Raises:
            ReductionFailed: there will be none.
        """

    def finish(self, limit: Limit) -> None:
        """Wait for the sum that was begun first of those under way.

        Raises:
            ReductionFailed: there is none.
        """

    def add(self, count: int, step: int, limit: Limit, rounding: Rounding | None = None) -> None:
        """``begin`` with the first number, and ``finish``.

        Raises:
            ReductionFailed: there is no sum.
        """

    def kill(self) -> None:
        """End all that was begun for the group. May be called twice."""

    def kill_process(self) -> None:
        """Only send what it runs a signal: from any thread, and when this process is about to end."""
