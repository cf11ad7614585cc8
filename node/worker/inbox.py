"""What the worker has been asked and not begun: read by a thread, so that cancelling works during a long step."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import NoReturn

from node import wire
from node.channel import BlockingChannel
from node.events import Event
from node.spec import Request, Total

PARENT_GONE = 3
UNREADABLE = 4
MOST_BYTES_AHEAD = 512 << 20
MOST_AHEAD = 1 << 14
"""Requests that may wait: no coordinator is so far ahead."""


class Inbox:
    """Requests in order; a request of a newer generation drops the older ones that have not begun.

    Totals are for the reduction that waits now, and stand in a queue of their own.

    When nothing more can be read the process ends at once, with exit code ``PARENT_GONE``, or ``UNREADABLE`` when what
    came was no request, or more than is remembered.

    Attributes:
        begun: generation of the request that was begun last.
        newest: newest generation heard of.
        bell: a descriptor that becomes readable when a newer generation is heard of; for ``select``.
        before_exit: called before the process ends because nothing more can be read.
    """

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel
        self._requests: deque[tuple[int, Request, int]] = deque()
        self._totals: deque[Total] = deque()
        self._bytes = 0  # of the requests that wait
        self._changed = threading.Condition()
        self.newest = 0
        self.begun = 0
        self.bell, self._ringer = os.pipe()
        os.set_blocking(self.bell, False)
        os.set_blocking(self._ringer, False)
        self.before_exit: Callable[[], None] | None = None
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next(self) -> Request:
        """The next request; waits for one."""
        with self._changed:
            self._changed.wait_for(lambda: self._requests)
            self.begun, request, size = self._requests.popleft()
            self._bytes -= size
            return request

    def total(self, until: float) -> Total | None:
        """The next total; None when the time is up, or a newer generation was heard of (see ``superseded``).

        Args:
            until: end of the wait, by ``time.monotonic()``.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._totals or self.newest > self.begun, max(0.0, until - time.monotonic()))
            # They may be of the newer generation already, in which nobody waits for one yet.
            return self._totals.popleft() if self._totals and self.newest == self.begun else None

    def superseded(self) -> bool:
        """Whether a newer generation was heard of since the last request was begun; empties the bell."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.bell, 64)
        return self.newest > self.begun

    def send(self, event: Event, generation: int | None = None) -> None:
        """Send an event up, stamped with a generation: that of the request which was begun last unless told."""
        try:
            self._channel.send(wire.encode_event(event, self.begun if generation is None else generation))
        except OSError:
            self._leave(PARENT_GONE)

    def _leave(self, code: int) -> NoReturn:
        if self.before_exit is not None:
            self.before_exit()
        os._exit(code)

    def _read(self) -> None:
        code = UNREADABLE
        try:
            self._take_in()
            code = PARENT_GONE
        except Exception:  # noqa: BLE001 - nobody above: a thread that just died would leave the process deaf
            traceback.print_exc()
        finally:
            # Nobody is left to work for, and the main thread may be deep in a computation.
            self._leave(code)

    def _take_in(self) -> None:
        while (data := self._channel.receive()) is not None:
            generation, request = wire.decode_request(data)
            with self._changed:
                if generation > self.newest:
                    self.newest = generation
                    self._requests.clear()
                    self._totals.clear()
                    self._bytes = 0
                    with contextlib.suppress(BlockingIOError):  # a full pipe is readable, which is all that is wanted
                        os.write(self._ringer, b"!")
                if generation == self.newest:
                    if isinstance(request, Total):
                        self._totals.append(request)
                    else:
                        self._requests.append((generation, request, len(data)))
                        self._bytes += len(data)
                    if self._bytes > MOST_BYTES_AHEAD or len(self._requests) + len(self._totals) > MOST_AHEAD:
                        raise wire.WireError("more was asked for in advance than a worker remembers")
                    self._changed.notify()
