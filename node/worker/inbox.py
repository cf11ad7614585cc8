"""What the worker has been asked and not begun: read by a thread, so that cancelling works during a long step."""

from __future__ import annotations

import os
import threading
from collections import deque

from node import wire
from node.channel import BlockingChannel
from node.events import Event
from node.spec import Request

PARENT_GONE = 3


class Inbox:
    """Requests in order; a request of a newer generation drops the older ones that have not begun."""

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel
        self._requests: deque[tuple[int, Request]] = deque()
        self._changed = threading.Condition()
        self._generation = 0
        self._begun = 0
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next(self) -> Request:
        """The next request; waits for one."""
        with self._changed:
            self._changed.wait_for(lambda: self._requests)
            self._begun, request = self._requests.popleft()
            return request

    def superseded(self) -> bool:
        """Whether a newer generation was heard of since the last request was begun."""
        return self._generation > self._begun

    def send(self, event: Event) -> None:
        """Send an event up, stamped with the newest generation heard of."""
        try:
            self._channel.send(wire.encode_event(event, self._generation))
        except OSError:
            os._exit(PARENT_GONE)

    def _read(self) -> None:
        while (data := self._channel.receive()) is not None:
            generation, request = wire.decode_request(data)
            with self._changed:
                if generation > self._generation:
                    self._generation = generation
                    self._requests.clear()
                if generation == self._generation:
                    self._requests.append((generation, request))
                    self._changed.notify()
        # Nobody is left to work for, and the main thread may be deep in a computation.
        os._exit(PARENT_GONE)
