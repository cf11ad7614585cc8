"""Simulated time: what is due next, happens next."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Clock:
    """A queue of what will happen. Of two things at the same time the one that was put in first happens first.

    Attributes:
        now: seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def at(self, seconds: float, happen: Callable[[], None]) -> None:
        """Have something happen then, or now if that has passed."""
        heapq.heappush(self._due, (max(seconds, self.now), next(self._count), happen))

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        """Have something happen in so many seconds."""
        self.at(self.now + seconds, happen)

    def run(self) -> None:
        """Let everything happen that is due, and what comes of it, until nothing is."""
        while self._due:
            self.now, _, happen = heapq.heappop(self._due)
            happen()
