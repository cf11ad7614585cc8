"""What a page shows, kept up to date for all who look at it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from coordinator.dashboard.watched import Watched

LOOK_EVERY_SECONDS = 1.0
REST_FACTOR = 9.0
"""After looking it rests so many times as long as that took: a long run costs a tenth of one core at most."""


def clock() -> str:
    """The time on this machine, as JSON."""
    return json.dumps({"now": time.time()})


class Feed:
    """The newest snapshot of some runs, made when somebody asks.

    Args:
        runs: that it shows.
        snapshot: makes what the browser gets of them.
        lock: that all feeds which show the same runs have in common.
    """

    def __init__(self, runs: Sequence[Watched], snapshot: Callable[[], dict[str, Any]], lock: asyncio.Lock) -> None:
        self._runs = runs
        self._snapshot = snapshot
        self._lock = lock
        self._look_at = 0.0
        self._seen: list[int] = []
        self.version = 0
        self._text = ""

    async def latest(self, *, last: bool = False) -> tuple[int, str]:
        """Number and JSON of the newest snapshot; the number is another one where anything has changed.

        In the JSON, ``now`` is the time on this machine, whose clock the browser's need not agree with.

        Args:
            last: look now, however short a time ago that was done: nobody will ask again.
        """
        async with self._lock:
            began = time.monotonic()
            if last or began >= self._look_at:
                await asyncio.to_thread(self._look)
                took = time.monotonic() - began
                self._look_at = began + took + max(LOOK_EVERY_SECONDS, REST_FACTOR * took)
            return self.version, f"{clock()[:-1]},{self._text[1:]}"

    def _look(self) -> None:
        for run in self._runs:
            run.refresh()
        seen = [run.version for run in self._runs]
        if seen != self._seen or not self._text:
            self._seen = seen
            self._text = json.dumps(self._snapshot(), separators=(",", ":"), allow_nan=False)
            self.version += 1
