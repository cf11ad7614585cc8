"""What a run has told so far, for whoever reads it, in any thread and in any event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from coordinator.stream import MISSED, Noted, RunEvent

KEPT_EVENTS = 10_000
"""At least so many of the last ones; who reads more slowly than that misses some, and is told how many."""
LOOK_SECONDS = 5.0
"""Who waits looks by itself so often, too."""


class EventLog:
    """A reader of a run (see ``stream.Reader``) that others read from: each of them everything, from the beginning.

    Where some are no longer kept, a reader gets a ``Noted`` of the kind ``MISSED`` in their place, with their number.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: list[RunEvent] = []
        self._first = 0  # number of the oldest that is kept
        self._ended = False
        self._listeners: list[Callable[[], None]] = []

    def handle(self, event: RunEvent) -> None:
        """See ``stream.Reader``."""
        with self._changed:
            self._events.append(event)
            if len(self._events) >= 2 * KEPT_EVENTS:
                del self._events[:KEPT_EVENTS]
                self._first += KEPT_EVENTS
        self._tell()

    def close(self) -> None:
        """See ``stream.Reader``; may be called twice."""
        with self._changed:
            self._ended = True
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()

    def since(self, position: int) -> tuple[list[RunEvent], int, bool]:
        """What was told from a position on, the position after it, and whether that is all."""
        with self._changed:
            events = self._events[max(position - self._first, 0) :]
            return events, self._first + len(self._events), self._ended

    def _news(self, position: int) -> tuple[list[RunEvent], int, bool]:
        """As ``since``, and what is missing before it."""
        events, after, ended = self.since(position)
        missed = after - len(events) - position
        if missed:
            line = f"{missed:,} events before the next are lost: only the last are kept, and they are read too slowly"
            events.insert(0, Noted(MISSED, line, "warning", {"events": missed}))
        return events, after, ended

    def __iter__(self) -> Iterator[RunEvent]:
        position, ended = 0, False
        while not ended:
            events, position, ended = self._news(position)
            yield from events
            with self._changed:
                if not self._ended and self._first + len(self._events) == position:
                    self._changed.wait(LOOK_SECONDS)

    async def __aiter__(self) -> AsyncIterator[RunEvent]:
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def listen() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and the reader with it
                loop.call_soon_threadsafe(news.set)

        with self._changed:
            self._listeners.append(listen)
        try:
            position, ended = 0, False
            while not ended:
                news.clear()
                events, position, ended = self._news(position)
                for event in events:
                    yield event
                if not ended:
                    await news.wait()
        finally:
            with self._changed:
                self._listeners.remove(listen)
